//! Makes sure of the small guest in the user's cache and prints the paths of its kernel and
//! initramfs. Arguments are kernel modules to put in.

use caisson_image::{ImageError, ImageStore, TerminalProgress};

fn main() -> Result<(), ImageError> {
    let modules: Vec<String> = std::env::args().skip(1).collect();
    let modules: Vec<&str> = modules.iter().map(String::as_str).collect();
    let store = ImageStore::open_default()?;
    let image = store.ensure_mini_with(&modules, &TerminalProgress::new())?;
    println!("{}", image.kernel.display());
    println!("{}", image.initramfs.display());
    Ok(())
}
