//! What several fuzz targets share.

pub mod cpu;
pub mod loader;
pub mod saved;
