//! What needs the kernel's bare interface. I/O ports from user space: Debian's cloud kernel has no `/dev/port`, so
//! ioperm(2) and one instruction. And a terminal that controls a child.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Writes `value` to `port`. Needs CAP_SYS_RAWIO, which the first process has.
pub fn out(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: asks the kernel for the right to one port; it touches no memory.
    if unsafe { libc::ioperm(port.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the right was granted above; a byte out to a port touches no memory of this process, and the ports
    // hutch uses belong to no device that could.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
    Ok(())
}

/// Makes the child's standard input, a terminal, the one that controls it: Ctrl-C and job control work there.
pub fn controlled(command: &mut Command) {
    let lead = || {
        nix::unistd::setsid()?;
        // SAFETY: the request takes no pointer; standard input is open.
        if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only two system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(lead) };
}
