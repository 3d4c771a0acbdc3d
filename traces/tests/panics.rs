//! Panics that are caught, in a process of their own: panic hooks are of the whole process.

use std::panic::{catch_unwind, set_hook, take_hook};
use std::sync::atomic::{AtomicUsize, Ordering};

use traces::catch_panic;

/// Panics that reached the hook that was set before.
static REPORTED: AtomicUsize = AtomicUsize::new(0);

#[test]
fn only_panics_that_are_caught_go_unreported() {
    let before = take_hook();
    set_hook(Box::new(move |panic| match panic.payload_as_str() {
        Some("counted") => drop(REPORTED.fetch_add(1, Ordering::Relaxed)),
        _ => before(panic),
    }));
    assert_eq!(catch_panic(|| 7), Ok(7));
    assert_eq!(catch_panic(|| -> () { panic!("counted") }), Err("counted".to_owned()));
    let nested = catch_panic(|| (catch_panic(|| panic!("{}", 1)), catch_panic(|| -> () { panic!("counted") })).0);
    assert_eq!(nested, Ok(Err::<(), _>("1".to_owned())));
    assert_eq!(REPORTED.load(Ordering::Relaxed), 0);
    assert!(std::thread::spawn(|| panic!("counted")).join().is_err());
    assert!(catch_unwind(|| panic!("counted")).is_err(), "and on this thread once the call has ended");
    assert_eq!(REPORTED.load(Ordering::Relaxed), 2);
}
