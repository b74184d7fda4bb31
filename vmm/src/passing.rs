//! Descriptors beside the bytes of a Unix socket (unix(7), SCM_RIGHTS): how a machine that runs is handed files.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most descriptors that come with one request: one for each disk, or each layer of one.
pub const MAX: usize = crate::plan::MAX_DEVICES;

/// Reads a stream and keeps what descriptors come with it.
pub struct Receiver {
    stream: UnixStream,
    fds: Vec<OwnedFd>,
}

impl Receiver {
    /// Reads `stream`.
    pub fn new(stream: UnixStream) -> Receiver {
        Receiver { stream, fds: Vec::new() }
    }

    /// The descriptors that came since this was last asked.
    pub fn descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }
}

impl Read for Receiver {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&self.stream, &mut [IoSliceMut::new(buffer)], &mut beside, flags)?;
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > MAX || got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::other("more descriptors came than a request has"));
        }
        Ok(got.bytes)
    }
}

/// Writes all of `bytes`, the descriptors with the first of them.
///
/// # Errors
/// The stream's; more than [`MAX`] descriptors.
pub fn send(mut stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.is_empty() {
        return stream.write_all(bytes);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if fds.len() > MAX || !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("more descriptors than a request has"));
    }
    let sent = loop {
        match sendmsg(stream, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => break sent?,
        }
    };
    stream.write_all(bytes.get(sent..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Seek;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn files_arrive_with_their_request() {
        let (to, from) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"handed over").unwrap();
        send(&to, b"two\n", &[file.as_fd(), file.as_fd()]).unwrap();
        send(&to, b"none\n", &[]).unwrap();
        let mut receiver = Receiver::new(from);
        let mut bytes = [0; 4];
        receiver.read_exact(&mut bytes).unwrap();
        let mut fds = receiver.descriptors();
        assert_eq!((&bytes, fds.len()), (b"two\n", 2));
        let mut text = String::new();
        let mut copy = File::from(fds.remove(0));
        copy.rewind().unwrap();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "handed over");
        assert!(receiver.read(&mut [0; 9]).is_ok_and(|n| n == 5) && receiver.descriptors().is_empty());
    }

    #[test]
    fn too_many_are_refused_on_either_side() {
        let (to, from) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(send(&to, b"x", &[file.as_fd(); MAX + 1]).is_err());
        // Request after request without one being taken.
        for _ in 0..2 {
            send(&to, b"x", &[file.as_fd(); MAX]).unwrap();
        }
        let mut receiver = Receiver::new(from);
        assert!(receiver.read(&mut [0; 1]).is_ok());
        assert!(receiver.read(&mut [0; 1]).is_err());
    }
}
