//! Hosts on which there is no user-mode network yet.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use caisson_packet::{Frame, Offloads, PacketBackend, PacketInfo};

use crate::{NetError, UserNetworkSpec};

/// The user-mode network, which this host does not have: none is ever made.
pub struct UserNetwork(std::convert::Infallible);

impl UserNetwork {
    /// Fails.
    ///
    /// # Errors
    /// Always.
    pub fn open(_: UserNetworkSpec) -> Result<Arc<Self>, NetError> {
        Err(NetError::Unsupported)
    }
}

impl PacketBackend for UserNetwork {
    fn info(&self) -> PacketInfo {
        match self.0 {}
    }
    fn set_receive_offloads(&self, _: Offloads) {
        match self.0 {}
    }
    fn poll_send(&self, _: &mut Context<'_>) -> Poll<()> {
        match self.0 {}
    }
    fn send(&self, _: Frame) {
        match self.0 {}
    }
    fn kick(&self) {
        match self.0 {}
    }
    fn poll_receive(&self, _: &mut Context<'_>) -> Poll<Frame> {
        match self.0 {}
    }
    fn reset(&self) {
        match self.0 {}
    }
}
