//! A kernel that refuses a system call, for tests.

use std::io;

/// Makes the kernel answer `call` with `errno` from here on, on this thread only and for good.
///
/// # Errors
/// What the kernel says to the filter.
pub(crate) fn refuse_on_this_thread(call: libc::c_long, errno: i32) -> io::Result<()> {
    install(&mut [
        step(LOAD, 0, 0, NUMBER),
        step(COMPARE, 0, 1, call as u32),
        step(ANSWER, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(ANSWER, 0, 0, libc::SECCOMP_RET_ALLOW),
    ])
}

/// As [`refuse_on_this_thread`], for `fcntl` with this command only.
///
/// # Errors
/// What the kernel says to the filter.
pub(crate) fn refuse_fcntl_on_this_thread(command: libc::c_int, errno: i32) -> io::Result<()> {
    install(&mut [
        step(LOAD, 0, 0, NUMBER),
        step(COMPARE, 0, 3, libc::SYS_fcntl as u32),
        step(LOAD, 0, 0, SECOND_ARGUMENT),
        step(COMPARE, 0, 1, command as u32),
        step(ANSWER, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(ANSWER, 0, 0, libc::SECCOMP_RET_ALLOW),
    ])
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const COMPARE: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const ANSWER: u32 = libc::BPF_RET | libc::BPF_K;
/// Where the number of the call is in what a filter sees.
const NUMBER: u32 = 0;
/// Where the lower half of the second argument is, the first byte being the lowest.
const SECOND_ARGUMENT: u32 = 24;

fn step(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn install(filter: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: without pointers, this only gives up privileges of this thread.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: `program` points to `filter`, both alive here; the kernel copies them and checks
    // the filter, which affects this thread alone.
    check(unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
