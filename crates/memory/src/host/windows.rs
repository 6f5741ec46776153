//! Guest memory on Windows: a section of the paging file, optionally of large pages. Type-checked only.
//!
//! The host charges a section's whole size against its commit limit when it is made, but uses memory only for pages
//! that were touched.

use std::{
    fs::File,
    io::{self, ErrorKind},
    ops::Range,
    os::windows::io::{AsHandle, AsRawHandle, BorrowedHandle, FromRawHandle, OwnedHandle},
    ptr::{self, NonNull},
};

use windows_sys::Win32::{
    Foundation::{
        ERROR_INVALID_FUNCTION, ERROR_MORE_DATA, ERROR_NOT_ALL_ASSIGNED, ERROR_NOT_SUPPORTED,
        GetLastError, HANDLE, INVALID_HANDLE_VALUE, LUID,
    },
    Security::{
        AdjustTokenPrivileges, LUID_AND_ATTRIBUTES, LookupPrivilegeValueW, SE_LOCK_MEMORY_NAME,
        SE_PRIVILEGE_ENABLED, TOKEN_ADJUST_PRIVILEGES, TOKEN_PRIVILEGES,
    },
    System::{
        IO::DeviceIoControl,
        Ioctl::{FILE_ALLOCATED_RANGE_BUFFER, FSCTL_QUERY_ALLOCATED_RANGES},
        Memory::{
            CreateFileMappingW, FILE_MAP, FILE_MAP_COPY, FILE_MAP_LARGE_PAGES, FILE_MAP_READ,
            FILE_MAP_WRITE, GetLargePageMinimum, MEMORY_BASIC_INFORMATION,
            MEMORY_MAPPED_VIEW_ADDRESS, MapViewOfFile, PAGE_PROTECTION_FLAGS, PAGE_READWRITE,
            PAGE_WRITECOPY, SEC_COMMIT, SEC_LARGE_PAGES, UnmapViewOfFile, VirtualQuery,
        },
        SystemInformation::{GlobalMemoryStatusEx, MEMORYSTATUSEX},
        Threading::{GetCurrentProcess, OpenProcessToken},
    },
};

use super::{HostObject, HugePages};

pub(super) const HUGE_PAGES_REMEDY: &str =
    "give your account the right \"Lock pages in memory\" and log in again, or leave hugepages off";

/// How many ranges of a file are asked for at once.
const BATCH: usize = 1024;

/// A view of a section.
#[derive(Debug)]
pub(super) struct Object {
    base: NonNull<u8>,
    len: usize,
    section: OwnedHandle,
    /// The file of a private mapping.
    file: Option<File>,
}

impl HostObject for Object {
    fn zeroed(_name: &str, len: usize, huge: HugePages) -> io::Result<Self> {
        let (size, protection, access) = if huge == HugePages::Hugetlb {
            // SAFETY: there is nothing to get wrong in asking.
            let large = unsafe { GetLargePageMinimum() };
            if large == 0 {
                return Err(ErrorKind::Unsupported.into());
            }
            allow_large_pages()?;
            let size = len
                .checked_next_multiple_of(large)
                .ok_or(ErrorKind::OutOfMemory)?;
            (size, SEC_COMMIT | SEC_LARGE_PAGES, FILE_MAP_LARGE_PAGES)
        } else {
            (len, SEC_COMMIT, 0)
        };
        let section = section(INVALID_HANDLE_VALUE, PAGE_READWRITE | protection, size)?;
        let base = view(&section, FILE_MAP_READ | FILE_MAP_WRITE | access, size)?;
        Ok(Self {
            base,
            len,
            section,
            file: None,
        })
    }

    fn private(file: File, len: usize) -> io::Result<Self> {
        let section = section(file.as_raw_handle(), PAGE_WRITECOPY, len)?;
        let base = view(&section, FILE_MAP_COPY, len)?;
        Ok(Self {
            base,
            len,
            section,
            file: Some(file),
        })
    }

    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    /// Everything if the memory is the paging file's: the host tells which pages are in memory, not which were ever
    /// used. Otherwise what the file has and what was written.
    fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let Some(file) = &self.file else {
            return Ok(vec![0..self.len as u64]);
        };
        let mut ranges = data_of(file, self.len as u64)?;
        ranges.extend(self.copied()?);
        Ok(ranges)
    }
}

impl Object {
    /// The pages of a private mapping that were written: the host makes those readable and writable, where before
    /// they were to be copied when written.
    fn copied(&self) -> io::Result<Vec<Range<u64>>> {
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < self.len {
            let mut info = MEMORY_BASIC_INFORMATION::default();
            // SAFETY: the address is in this object's view; the host writes at most the size it is given.
            let written = unsafe {
                VirtualQuery(
                    self.base.as_ptr().add(at).cast(),
                    &raw mut info,
                    size_of::<MEMORY_BASIC_INFORMATION>(),
                )
            };
            if written == 0 || info.RegionSize == 0 {
                return Err(io::Error::last_os_error());
            }
            let end = at.saturating_add(info.RegionSize).min(self.len);
            if info.Protect & PAGE_READWRITE != 0 {
                ranges.push(at as u64..end as u64);
            }
            at = end;
        }
        Ok(ranges)
    }
}

/// A section without a name over the first `size` bytes of a file, or of the paging file.
fn section(
    file: HANDLE,
    protection: PAGE_PROTECTION_FLAGS,
    size: usize,
) -> io::Result<OwnedHandle> {
    let size = size as u64;
    // SAFETY: the handle is a file's, kept open by the caller, or the value that stands for the paging file; there are
    // neither attributes nor a name.
    let handle = unsafe {
        CreateFileMappingW(
            file,
            ptr::null(),
            protection,
            (size >> 32) as u32,
            size as u32,
            ptr::null(),
        )
    };
    if handle.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the handle is new and nobody else's.
    Ok(unsafe { OwnedHandle::from_raw_handle(handle) })
}

/// Maps `size` bytes of a section at an address of the host's choice.
fn view(section: &OwnedHandle, access: FILE_MAP, size: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: the handle is an open section's; a fresh view disturbs nothing.
    let view = unsafe { MapViewOfFile(section.as_raw_handle(), access, 0, 0, size) };
    NonNull::new(view.Value.cast()).ok_or_else(io::Error::last_os_error)
}

/// Switches on the right to lock pages in memory, which large pages need. Accounts that were given it have it switched
/// off at first.
fn allow_large_pages() -> io::Result<()> {
    let mut token = ptr::null_mut();
    // SAFETY: the process's own handle needs no closing; the host writes one handle.
    let opened =
        unsafe { OpenProcessToken(GetCurrentProcess(), TOKEN_ADJUST_PRIVILEGES, &raw mut token) };
    if opened == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the handle is new and nobody else's.
    let token = unsafe { OwnedHandle::from_raw_handle(token) };
    let mut luid = LUID::default();
    // SAFETY: the name is a constant that ends with a zero; the host writes one LUID.
    if unsafe { LookupPrivilegeValueW(ptr::null(), SE_LOCK_MEMORY_NAME, &raw mut luid) } == 0 {
        return Err(io::Error::last_os_error());
    }
    let wanted = TOKEN_PRIVILEGES {
        PrivilegeCount: 1,
        Privileges: [LUID_AND_ATTRIBUTES {
            Luid: luid,
            Attributes: SE_PRIVILEGE_ENABLED,
        }],
    };
    // SAFETY: the token is open for this; `wanted` has as many entries as it says; nothing is asked back.
    let (adjusted, error) = unsafe {
        let adjusted = AdjustTokenPrivileges(
            token.as_raw_handle(),
            0,
            &raw const wanted,
            0,
            ptr::null_mut(),
            ptr::null_mut(),
        );
        (adjusted, GetLastError())
    };
    // It succeeds also when there is nothing to switch on.
    if adjusted == 0 || error == ERROR_NOT_ALL_ASSIGNED {
        return Err(io::Error::from_raw_os_error(error as i32));
    }
    Ok(())
}

impl AsHandle for Object {
    fn as_handle(&self) -> BorrowedHandle<'_> {
        self.section.as_handle()
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let view = MEMORY_MAPPED_VIEW_ADDRESS {
            Value: self.base.as_ptr().cast(),
        };
        // SAFETY: the address is that of this object's view; the last holder is gone, so nobody has an address into it.
        let _ = unsafe { UnmapViewOfFile(view) };
    }
}

/// The parts of the first `len` bytes of a file that are not holes; all of it where the file system does not tell.
pub(super) fn data_of(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut found = vec![FILE_ALLOCATED_RANGE_BUFFER::default(); BATCH];
    let mut at = 0;
    while at < len {
        let asked = FILE_ALLOCATED_RANGE_BUFFER {
            FileOffset: at as i64,
            Length: (len - at) as i64,
        };
        let mut bytes = 0;
        // SAFETY: the handle is an open file's; the host reads one `asked` and writes at most the size of `found` and
        // one length. The file was opened for synchronous use, so it is done when the call returns.
        let (done, error) = unsafe {
            let done = DeviceIoControl(
                file.as_raw_handle(),
                FSCTL_QUERY_ALLOCATED_RANGES,
                (&raw const asked).cast(),
                size_of::<FILE_ALLOCATED_RANGE_BUFFER>() as u32,
                found.as_mut_ptr().cast(),
                (BATCH * size_of::<FILE_ALLOCATED_RANGE_BUFFER>()) as u32,
                &raw mut bytes,
                ptr::null_mut(),
            );
            (done != 0, GetLastError())
        };
        match error {
            _ if done => {}
            ERROR_MORE_DATA => {}
            ERROR_INVALID_FUNCTION | ERROR_NOT_SUPPORTED => {
                ranges.push(at..len);
                break;
            }
            _ => return Err(io::Error::from_raw_os_error(error as i32)),
        }
        let count = (bytes as usize / size_of::<FILE_ALLOCATED_RANGE_BUFFER>()).min(BATCH);
        for range in &found[..count] {
            let start = (range.FileOffset as u64).clamp(at, len);
            let end = start.saturating_add(range.Length as u64).min(len);
            if start < end {
                ranges.push(start..end);
                at = end;
            }
        }
        if done || count == 0 {
            break;
        }
    }
    Ok(ranges)
}

/// RAM of the host in bytes, if it says.
pub(super) fn physical_memory() -> Option<u64> {
    let mut status = MEMORYSTATUSEX {
        dwLength: size_of::<MEMORYSTATUSEX>() as u32,
        ..Default::default()
    };
    // SAFETY: the structure is as long as it says.
    let answered = unsafe { GlobalMemoryStatusEx(&raw mut status) };
    (answered != 0 && status.ullTotalPhys > 0).then_some(status.ullTotalPhys)
}
