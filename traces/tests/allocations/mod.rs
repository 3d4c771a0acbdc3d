//! The largest single allocation of a thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which records the largest allocation of each thread.
pub struct Allocations;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

impl Allocations {
    /// Runs `work` and returns the size in bytes of its largest allocation.
    pub fn largest<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        LARGEST.set(0);
        let result = work();
        (result, LARGEST.get())
    }

    fn note(size: usize) {
        // A thread that ends has no cell any more, and its value is not needed.
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
