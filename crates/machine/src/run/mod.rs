//! The life of a machine: its threads, and what starts, holds and ends them.

pub(crate) mod events;
pub(crate) mod gate;
pub(crate) mod supervisor;
pub(crate) mod vcpus;
