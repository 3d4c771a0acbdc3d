//! Runs a command until just before one of its changes to the file system, and kills it there.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_int, c_uint, c_void, pid_t};

/// What is added to the signal of a stop at a system call.
const AT_SYSCALL: c_int = 0x80;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Killed,
    /// It had no such change left, and ended with this status.
    Exited(c_int),
}

/// Kills a command before its `change`-th change to the file system, counted from 1: names that it makes, renames or
/// removes, if they are counted. None if processes cannot be traced here.
pub fn killed_before(change: usize, is_counted: impl Fn(&str) -> bool, command: &mut Command) -> Option<End> {
    // SAFETY: both functions may be called between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::setpgid(0, 0) == 0 && libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) == 0 {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        });
    }
    let leader = match command.spawn() {
        Ok(child) => child.id().cast_signed(),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
        Err(error) => panic!("{command:?}: {error}"),
    };
    assert_eq!(wait(leader).map(|(process, _)| process), Some(leader), "it stops at its beginning");
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    trace(libc::PTRACE_SETOPTIONS, leader, 0, options as usize);
    trace(libc::PTRACE_SYSCALL, leader, 0, 0);
    let (mut changes, mut end) = (0, None);
    while let Some((thread, status)) = wait(-leader) {
        if libc::WIFSTOPPED(status) {
            let is_at_call = libc::WSTOPSIG(status) == libc::SIGTRAP | AT_SYSCALL;
            let is_change = is_at_call && changed(thread).is_some_and(|path| is_counted(&path));
            changes += usize::from(is_change);
            if is_change && changes == change {
                // SAFETY: it has no effect on this process.
                unsafe { libc::kill(leader, libc::SIGKILL) };
            }
            // Stops at system calls, at new threads and at their beginning are of tracing; other signals are passed on.
            let signal = match libc::WSTOPSIG(status) {
                libc::SIGTRAP | libc::SIGSTOP => 0,
                signal if signal & AT_SYSCALL != 0 => 0,
                signal => signal,
            };
            trace(libc::PTRACE_SYSCALL, thread, 0, signal as usize);
        } else if thread == leader {
            end = Some(match libc::WIFEXITED(status) {
                true => End::Exited(libc::WEXITSTATUS(status)),
                false => End::Killed,
            });
        }
    }
    Some(end.expect("it ends"))
}

/// A process or thread that changed its state, and how; none if there is no such child any more.
fn wait(process: pid_t) -> Option<(pid_t, c_int)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is there to be written.
        match unsafe { libc::waitpid(process, &raw mut status, libc::__WALL) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return None,
            process => return Some((process, status)),
        }
    }
}

/// A thread that was killed meanwhile cannot be asked any more.
fn trace(request: c_uint, thread: pid_t, address: usize, data: usize) -> bool {
    // SAFETY: what `data` points to, if it is an address, is as the request needs it.
    unsafe { libc::ptrace(request, thread, address as *mut c_void, data as *mut c_void) >= 0 }
}

/// The name that a thread is about to change in the file system; of one that is renamed, the new name.
fn changed(thread: pid_t) -> Option<String> {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    let size = size_of::<libc::ptrace_syscall_info>();
    if !trace(libc::PTRACE_GET_SYSCALL_INFO, thread, size, info.as_mut_ptr() as usize) {
        return None;
    }
    // SAFETY: zeroes are a value, and the kernel wrote over them.
    let info = unsafe { info.assume_init() };
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: `op` says which it is.
    let (number, arguments) = unsafe { (info.u.entry.nr, info.u.entry.args) };
    #[cfg(target_arch = "x86_64")]
    let of_x86 = match number.cast_signed() {
        libc::SYS_mkdir | libc::SYS_unlink | libc::SYS_rmdir => Some(0),
        libc::SYS_rename => Some(1),
        _ => None,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let of_x86 = None;
    let place = of_x86.or(match number.cast_signed() {
        libc::SYS_mkdirat | libc::SYS_unlinkat => Some(1),
        libc::SYS_openat if arguments[2] & libc::O_CREAT as u64 != 0 => Some(1),
        libc::SYS_renameat | libc::SYS_renameat2 => Some(3),
        _ => None,
    })?;
    text_at(thread, arguments[place])
}

/// A text in the memory of a thread, up to its zero.
fn text_at(thread: pid_t, address: u64) -> Option<String> {
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut text = vec![0; 4096];
    // Less where the memory ends.
    let read = memory.read_at(&mut text, address).ok()?;
    text.truncate(text[..read].iter().position(|byte| *byte == 0)?);
    String::from_utf8(text).ok()
}
