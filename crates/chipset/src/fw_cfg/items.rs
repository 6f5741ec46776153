//! The items on offer: numbered ones, and files with names.

use alloc::{collections::BTreeMap, string::String, sync::Arc, vec::Vec};

/// The contents of a read-only item. Anything that can show its bytes, so that a kernel or an initrd can be a mapped
/// file.
pub type ItemData = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// The key of the first file; the others follow in the order of their names.
pub const FIRST_FILE: u16 = 0x20;
/// The longest name of a file, in bytes: its directory entry has 56 with a zero at the end.
pub const MAX_FILE_NAME: usize = 55;
/// Keys from here on have other meanings (bit 14 was a write channel).
const LAST_FILE: u16 = 0x3FFF;
const ENTRY_LEN: usize = 64;

/// Keys of the numbered items that loaders and firmware look for.
pub mod keys {
    /// `QEMU`: tells that the interface is there. Always present.
    pub const SIGNATURE: u16 = 0x00;
    /// Which interfaces there are, 32 bits: bit 0 ports, bit 1 DMA. Always present.
    pub const ID: u16 = 0x01;
    /// Bytes of RAM, 64 bits.
    pub const RAM_SIZE: u16 = 0x03;
    /// Whether there is no display, 16 bits.
    pub const NO_GRAPHIC: u16 = 0x04;
    /// How many vCPUs run at the start, 16 bits.
    pub const CPU_COUNT: u16 = 0x05;
    /// Where the kernel's protected-mode part is to go, 32 bits.
    pub const KERNEL_ADDRESS: u16 = 0x07;
    /// Its length, 32 bits.
    pub const KERNEL_SIZE: u16 = 0x08;
    /// Where the initrd is to go, 32 bits.
    pub const INITRD_ADDRESS: u16 = 0x0A;
    /// Its length, 32 bits.
    pub const INITRD_SIZE: u16 = 0x0B;
    /// Whether firmware shows a boot menu, 16 bits.
    pub const BOOT_MENU: u16 = 0x0E;
    /// How many vCPUs there can be, 16 bits.
    pub const MAX_CPUS: u16 = 0x0F;
    /// Where an ELF kernel is entered, 32 bits.
    pub const KERNEL_ENTRY: u16 = 0x10;
    /// The kernel's protected-mode part.
    pub const KERNEL_DATA: u16 = 0x11;
    /// The initrd.
    pub const INITRD_DATA: u16 = 0x12;
    /// Where the kernel command line is to go, 32 bits.
    pub const CMDLINE_ADDRESS: u16 = 0x13;
    /// Its length with the zero at its end, 32 bits.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// The kernel command line with a zero at its end.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// Where the kernel's set-up part is to go, 32 bits.
    pub const SETUP_ADDRESS: u16 = 0x16;
    /// Its length, 32 bits.
    pub const SETUP_SIZE: u16 = 0x17;
    /// The kernel's set-up part.
    pub const SETUP_DATA: u16 = 0x18;
    /// The directory of files. Always present.
    pub const FILE_DIRECTORY: u16 = 0x19;
}

/// An item that cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ItemError {
    /// There is an item with this key.
    #[error("firmware configuration item {0:#06x} exists already; give each item once")]
    DuplicateKey(u16),
    /// There is a file with this name.
    #[error("firmware configuration file \"{0}\" exists already; give each file once")]
    DuplicateFile(String),
    /// The key belongs to the directory, to files, or to no item.
    #[error(
        "firmware configuration key {0:#06x} cannot be chosen; use 0x0002 to 0x0018 or 0x8000 and up"
    )]
    ReservedKey(u16),
    /// The name does not fit the directory.
    #[error(
        "firmware configuration file name \"{0}\" is not 1 to {MAX_FILE_NAME} printable ASCII bytes; rename it"
    )]
    BadName(String),
    /// The contents are longer than a length in the directory can be.
    #[error("firmware configuration item \"{0}\" is longer than 4 GiB; items have 32-bit lengths")]
    TooLong(String),
    /// All keys for files are in use.
    #[error("there is no room for another firmware configuration file")]
    TooManyFiles,
}

enum Item {
    Fixed(ItemData),
    Writable { initial: Vec<u8>, current: Vec<u8> },
}

impl Item {
    fn bytes(&self) -> &[u8] {
        match self {
            Item::Fixed(data) => (**data).as_ref(),
            Item::Writable { current, .. } => current,
        }
    }
}

/// Collects the items of a machine.
pub struct Items {
    numbered: BTreeMap<u16, Item>,
    files: BTreeMap<String, Item>,
}

impl Default for Items {
    fn default() -> Self {
        Self::new()
    }
}

impl Items {
    /// Signature and interface id, and no files yet.
    pub fn new() -> Self {
        let mut numbered = BTreeMap::new();
        numbered.insert(keys::SIGNATURE, Item::Fixed(Arc::new(*b"QEMU")));
        numbered.insert(keys::ID, Item::Fixed(Arc::new(3u32.to_le_bytes())));
        Self {
            numbered,
            files: BTreeMap::new(),
        }
    }

    /// Adds the item with number `key`, one of [`keys`] or an architecture's own from 0x8000 on.
    ///
    /// # Errors
    /// When the key is taken or reserved, or the contents are too long.
    pub fn add(&mut self, key: u16, data: ItemData) -> Result<(), ItemError> {
        if key == keys::FILE_DIRECTORY || (FIRST_FILE..0x8000).contains(&key) {
            return Err(ItemError::ReservedKey(key));
        }
        if self.numbered.contains_key(&key) {
            return Err(ItemError::DuplicateKey(key));
        }
        check_len(&alloc::format!("{key:#06x}"), (*data).as_ref().len())?;
        self.numbered.insert(key, Item::Fixed(data));
        Ok(())
    }

    /// Adds a 16-bit value, little-endian.
    ///
    /// # Errors
    /// As for [`Items::add`].
    pub fn add_u16(&mut self, key: u16, value: u16) -> Result<(), ItemError> {
        self.add(key, Arc::new(value.to_le_bytes()))
    }

    /// Adds a 32-bit value, little-endian.
    ///
    /// # Errors
    /// As for [`Items::add`].
    pub fn add_u32(&mut self, key: u16, value: u32) -> Result<(), ItemError> {
        self.add(key, Arc::new(value.to_le_bytes()))
    }

    /// Adds a 64-bit value, little-endian.
    ///
    /// # Errors
    /// As for [`Items::add`].
    pub fn add_u64(&mut self, key: u16, value: u64) -> Result<(), ItemError> {
        self.add(key, Arc::new(value.to_le_bytes()))
    }

    /// Adds the file `name`, such as `etc/acpi/tables`.
    ///
    /// # Errors
    /// When the name is taken or does not fit, the contents are too long, or there are too many files.
    pub fn add_file(&mut self, name: &str, data: ItemData) -> Result<(), ItemError> {
        check_len(name, (*data).as_ref().len())?;
        self.insert_file(name, Item::Fixed(data))
    }

    /// Adds the file `name`, which the guest may overwrite but not lengthen.
    ///
    /// # Errors
    /// As for [`Items::add_file`].
    pub fn add_writable_file(&mut self, name: &str, initial: Vec<u8>) -> Result<(), ItemError> {
        check_len(name, initial.len())?;
        self.insert_file(
            name,
            Item::Writable {
                current: initial.clone(),
                initial,
            },
        )
    }

    fn insert_file(&mut self, name: &str, item: Item) -> Result<(), ItemError> {
        let fits = (1..=MAX_FILE_NAME).contains(&name.len());
        if !fits || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ItemError::BadName(name.into()));
        }
        if self.files.contains_key(name) {
            return Err(ItemError::DuplicateFile(name.into()));
        }
        if self.files.len() > usize::from(LAST_FILE - FIRST_FILE) {
            return Err(ItemError::TooManyFiles);
        }
        self.files.insert(name.into(), item);
        Ok(())
    }

    /// Numbers the files and writes their directory: a big-endian count, then per file length, key, two zero bytes and
    /// name.
    pub(super) fn finish(self) -> Table {
        let Self {
            numbered: mut items,
            files,
        } = self;
        let mut names = Vec::with_capacity(files.len());
        let mut directory = Vec::with_capacity(4 + files.len() * ENTRY_LEN);
        directory.extend_from_slice(&(files.len() as u32).to_be_bytes());
        for (key, (name, item)) in (FIRST_FILE..).zip(files) {
            let start = directory.len();
            directory.extend_from_slice(&(item.bytes().len() as u32).to_be_bytes());
            directory.extend_from_slice(&key.to_be_bytes());
            directory.extend_from_slice(&[0; 2]);
            directory.extend_from_slice(name.as_bytes());
            directory.resize(start + ENTRY_LEN, 0);
            items.insert(key, item);
            names.push(name);
        }
        items.insert(keys::FILE_DIRECTORY, Item::Fixed(Arc::new(directory)));
        Table { items, names }
    }
}

fn check_len(name: &str, len: usize) -> Result<(), ItemError> {
    match u32::try_from(len) {
        Ok(_) => Ok(()),
        Err(_) => Err(ItemError::TooLong(name.into())),
    }
}

/// The finished items.
pub(super) struct Table {
    items: BTreeMap<u16, Item>,
    /// The names of the files, in the order of their keys.
    names: Vec<String>,
}

impl Table {
    pub(super) fn get(&self, key: u16) -> Option<&[u8]> {
        self.items.get(&key).map(Item::bytes)
    }

    pub(super) fn file(&self, name: &str) -> Option<&[u8]> {
        let index = self
            .names
            .binary_search_by(|other| other.as_str().cmp(name))
            .ok()?;
        self.get(FIRST_FILE + index as u16)
    }

    /// Name, key and length of each file.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, u16, usize)> {
        (FIRST_FILE..)
            .zip(&self.names)
            .map(|(key, name)| (name.as_str(), key, self.get(key).map_or(0, <[u8]>::len)))
    }

    pub(super) fn writable(&mut self, key: u16) -> Option<&mut [u8]> {
        match self.items.get_mut(&key)? {
            Item::Writable { current, .. } => Some(current),
            Item::Fixed(_) => None,
        }
    }

    pub(super) fn reset(&mut self) {
        for item in self.items.values_mut() {
            if let Item::Writable { initial, current } = item {
                current.clone_from(initial);
            }
        }
    }

    /// The contents of the writable items.
    pub(super) fn written(&self) -> Vec<(u16, Vec<u8>)> {
        self.items
            .iter()
            .filter_map(|(key, item)| match item {
                Item::Writable { current, .. } => Some((*key, current.clone())),
                Item::Fixed(_) => None,
            })
            .collect()
    }

    /// Takes over the contents of the writable items; `None`, and nothing is changed, when the keys or lengths are
    /// others.
    pub(super) fn restore(&mut self, written: Vec<(u16, Vec<u8>)>) -> Option<()> {
        let shape = |items: &[(u16, Vec<u8>)]| -> Vec<(u16, usize)> {
            items
                .iter()
                .map(|(key, bytes)| (*key, bytes.len()))
                .collect()
        };
        if shape(&written) != shape(&self.written()) {
            return None;
        }
        for (key, bytes) in written {
            self.writable(key)?.copy_from_slice(&bytes);
        }
        Some(())
    }
}
