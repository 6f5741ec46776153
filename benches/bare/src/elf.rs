//! PVH kernels in 64-bit ELF files (ELF-64 object file format; Xen's PVH boot ABI).

/// Program header types: to be loaded; notes.
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// The note with the address of the 32-bit entry: owner "Xen", XEN_ELFNOTE_PHYS32_ENTRY.
const ENTRY_NOTE: &[u8] = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0";

/// Loads `file` into `memory` and gives its entry. `None` if it is not such a file, or does not fit.
pub(crate) fn load(file: &[u8], memory: &mut [u8]) -> Option<u32> {
    file.starts_with(b"\x7fELF\x02\x01").then_some(())?;
    let table = long(file, 32)?;
    let count = usize::from(u16::from_le_bytes(file.get(56..58)?.try_into().ok()?));
    let mut entry = None;
    for index in 0..count {
        let header = file.get(table.checked_add(index.checked_mul(56)?)?..)?;
        let (offset, address, len) = (long(header, 8)?, long(header, 24)?, long(header, 32)?);
        let contents = file.get(offset..offset.checked_add(len)?)?;
        match word(header, 0)? {
            LOAD => memory
                .get_mut(address..address.checked_add(len)?)?
                .copy_from_slice(contents),
            NOTE => {
                let at = contents
                    .windows(ENTRY_NOTE.len())
                    .position(|bytes| bytes == ENTRY_NOTE)?;
                entry = word(contents, at + ENTRY_NOTE.len());
            }
            _ => {}
        }
    }
    entry
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kernel_is_refused() {
        let mut memory = [0; 64];
        assert_eq!(load(b"", &mut memory), None);
        assert_eq!(load(b"\x7fELF\x02\x01", &mut memory), None);
        let mut file = vec![0; 200];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert_eq!(load(&file, &mut memory), None, "no program headers");
        // One loadable segment beyond memory.
        file[32] = 64;
        file[56] = 1;
        file[64] = 1;
        file[64 + 24] = 60;
        file[64 + 32] = 8;
        assert_eq!(load(&file, &mut memory), None);
    }

    #[test]
    fn segments_and_the_entry_are_found() {
        let mut memory = [0; 64];
        let mut file = vec![0; 64 + 2 * 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (file[32], file[56]) = (64, 2);
        let end = file.len() as u8;
        (file[64], file[64 + 8], file[64 + 24], file[64 + 32]) = (1, end, 16, 3);
        (file[120], file[120 + 8], file[120 + 32]) = (4, end + 3, 20);
        file.extend(b"abc");
        file.extend(ENTRY_NOTE);
        file.extend(0x10_0020u32.to_le_bytes());
        assert_eq!(load(&file, &mut memory), Some(0x10_0020));
        assert_eq!(&memory[15..20], b"\0abc\0");
    }
}
