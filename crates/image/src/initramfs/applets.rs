//! Which applets a busybox program has, read from the program itself.
//!
//! busybox keeps the names in one table: NUL-terminated, sorted by byte, the first `[` or `[[`
//! (libbb/appletlib.c). Reading the table needs neither a guest nor a host that could run it.

/// The names in `busybox`, sorted; `None` if there is no table with at least `sh` in it.
pub(super) fn names(busybox: &[u8]) -> Option<Vec<&str>> {
    let mut start = 0;
    while let Some(found) = busybox[start..]
        .windows(3)
        .position(|bytes| bytes == b"\0[\0")
    {
        let table = start + found + 1;
        let names = table_at(&busybox[table..]);
        if names.contains(&"sh") && names.contains(&"busybox") {
            return Some(names);
        }
        start = table;
    }
    None
}

fn table_at(bytes: &[u8]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for name in bytes.split(|&byte| byte == 0) {
        let valid = !name.is_empty()
            && name.len() <= 32
            && name
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || b"[-_.+".contains(byte));
        let Some(name) = std::str::from_utf8(name).ok().filter(|_| valid) else {
            break;
        };
        if names.last().is_some_and(|last| *last >= name) {
            break;
        }
        names.push(name);
    }
    names
}

#[cfg(test)]
pub(in crate::initramfs) mod tests {
    use super::*;

    pub(in crate::initramfs) fn table() -> Vec<u8> {
        b"\0[\0[[\0acpid\0ash\0busybox\0cat\0linux32\0ls\0sh\0zcat\0\0junk\0".to_vec()
    }

    #[test]
    fn the_table_ends_where_the_order_does() {
        let mut program = b"\x7fELF\0[\0not the table\0".to_vec();
        program.extend(table());
        assert_eq!(
            names(&program).unwrap(),
            [
                "[", "[[", "acpid", "ash", "busybox", "cat", "linux32", "ls", "sh", "zcat"
            ]
        );
    }

    #[test]
    fn a_program_without_the_table_has_none() {
        assert_eq!(names(b"\x7fELF\0[\0a\0b\0"), None);
        assert_eq!(names(b""), None);
    }
}
