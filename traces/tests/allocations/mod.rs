//! The largest piece of memory that a thread asks for at once.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which remembers what each thread asked for.
pub struct Allocations;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

impl Allocations {
    /// Runs `work` and tells the size in bytes of the largest piece of memory that it asked for.
    pub fn largest<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        LARGEST.set(0);
        let result = work();
        (result, LARGEST.get())
    }

    fn note(size: usize) {
        // A thread that ends has no cell any more, and nobody asks it.
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
    }
}

// SAFETY: the system's allocator does all of the work.
unsafe impl GlobalAlloc for Allocations {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}
