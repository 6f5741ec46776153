//! Waiting for many descriptors.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd, RawFd},
};

use rustix::event::epoll;

/// Has `poll` report `token` whenever `descriptor` becomes readable or is written to again.
///
/// # Errors
/// The host's. EEXIST: it does so already.
pub(crate) fn watch(poll: &OwnedFd, descriptor: RawFd, token: u64) -> io::Result<()> {
    if descriptor < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor is only handed to the kernel, which refuses one that is not open.
    let source = unsafe { BorrowedFd::borrow_raw(descriptor) };
    epoll::add(
        poll,
        source,
        epoll::EventData::new_u64(token),
        epoll::EventFlags::IN | epoll::EventFlags::ET,
    )?;
    Ok(())
}
