//! Panics of other libraries become errors.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is caught and must not be reported on standard error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

static HOOK: Once = Once::new();

/// Calls a library that may panic on a damaged file. A panic on this thread becomes an error with the message of the
/// panic, and nothing is printed. Panics elsewhere are reported as before: the panic hook that was set at the first call
/// is called for them.
///
/// # Errors
/// If the call panics.
pub fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    HOOK.call_once(|| {
        let others = take_hook();
        set_hook(Box::new(move |panic| {
            // A thread that ends has no cell any more, and catches nothing.
            if !CAUGHT.try_with(Cell::get).unwrap_or(false) {
                others(panic);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CAUGHT.set(outer);
    result.map_err(|panic| match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(message), _) => (*message).to_owned(),
        (None, Some(message)) => message.clone(),
        (None, None) => "no message".to_owned(),
    })
}
