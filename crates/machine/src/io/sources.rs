//! What devices draw on at the host.

use std::task::{Context, Poll};

use caisson_virtio::rng::{EntropyError, EntropySource};

use crate::host;

/// The host's own random numbers, which it gives at once.
pub(crate) struct HostEntropy;

impl EntropySource for HostEntropy {
    fn poll_fill(
        &mut self,
        _: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<(), EntropyError>> {
        Poll::Ready(host::random(buffer).map_err(|_| EntropyError))
    }
}
