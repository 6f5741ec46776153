//! The parts of ELF that loaders need: header, program headers, notes.
//!
//! Source: System V ABI, "Object Files" and the AMD64 and i386 supplements.
//! Sections, symbols and relocations are not read.

use alloc::{format, string::String, vec::Vec};

use crate::{
    KernelKind, LoadError,
    bytes::{align_up, array, slice, u8_at, u16_at, u32_at, u64_at},
};

/// The first bytes of every ELF file.
pub(crate) const MAGIC: &[u8] = b"\x7fELF";

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A kernel has a handful of segments; a file with more is taken for hostile,
/// which bounds the work of placing them.
const MAX_SEGMENTS: usize = 256;

/// A loadable segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    /// Where it is linked to run.
    pub vaddr: u64,
    /// Where it is loaded.
    pub paddr: u64,
    /// Length in memory; what `data` does not fill is zero.
    pub memsz: u64,
    /// Contents from the file.
    pub data: &'a [u8],
}

/// An x86 ELF executable, 32- or 64-bit.
#[derive(Debug)]
pub(crate) struct Elf<'a> {
    /// Whether it is 64-bit code for x86-64.
    pub is_64: bool,
    /// The entry point as written in the header.
    pub entry: u64,
    /// Loadable segments with at least one byte, in file order.
    pub segments: Vec<Segment<'a>>,
    notes: Vec<&'a [u8]>,
}

/// Why a file that begins like ELF was not accepted.
#[derive(Debug)]
pub(crate) enum ElfError {
    /// Not an executable of this architecture; see [`describe_refused`].
    Foreign,
    /// The file ends too early: what, and how many bytes it would need.
    Truncated(&'static str, u64),
    /// A header says something impossible.
    Corrupt(String),
}

impl ElfError {
    /// The error as one about an executable of which no more is known.
    pub(crate) fn for_elf(self, file: &[u8]) -> LoadError {
        let have = file.len();
        let found = match self {
            Self::Foreign => crate::identify::identify(file),
            Self::Truncated(what, needed) => crate::FileKind::Elf(format!(
                "a truncated ELF program for x86 ({what} needs {needed} bytes but the file has {have})"
            )),
            Self::Corrupt(reason) => {
                crate::FileKind::Elf(format!("a corrupt ELF program for x86 ({reason})"))
            }
        };
        LoadError::NotAKernel { found }
    }

    /// The error as one about a kernel of `kind` in `file`.
    pub(crate) fn for_kind(self, kind: KernelKind, file: &[u8]) -> LoadError {
        match self {
            Self::Foreign => LoadError::NotAKernel {
                found: crate::identify::identify(file),
            },
            Self::Truncated(what, needed) => LoadError::Truncated {
                kind,
                what,
                needed,
                have: file.len() as u64,
            },
            Self::Corrupt(reason) => LoadError::Corrupt { kind, reason },
        }
    }
}

/// Whether the file begins as an x86 executable that [`Elf::parse`] would try to read.
pub(crate) fn is_x86_executable(file: &[u8]) -> bool {
    if !file.starts_with(MAGIC) || u8_at(file, 5) != Some(LITTLE_ENDIAN) {
        return false;
    }
    let machine = match u8_at(file, 4) {
        Some(CLASS_32) => MACHINE_386,
        Some(CLASS_64) => MACHINE_X86_64,
        _ => return false,
    };
    u16_at(file, 18) == Some(machine) && matches!(u16_at(file, 16), Some(TYPE_EXEC | TYPE_DYN))
}

impl<'a> Elf<'a> {
    /// Reads the headers and checks that each segment is in the file.
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self, ElfError> {
        if !is_x86_executable(file) {
            return Err(ElfError::Foreign);
        }
        let is_64 = u8_at(file, 4) == Some(CLASS_64);
        let header_len = if is_64 { 64 } else { 52 };
        if (file.len() as u64) < header_len {
            return Err(ElfError::Truncated("the ELF header", header_len));
        }
        // Offsets of e_entry, e_phoff, e_phentsize and e_phnum.
        let word = |off| {
            if is_64 {
                u64_at(file, off)
            } else {
                u32_at(file, off).map(u64::from)
            }
        };
        let short = ElfError::Truncated("the ELF header", header_len);
        let (Some(entry), Some(phoff), Some(phentsize), Some(phnum)) = (
            word(24),
            word(if is_64 { 32 } else { 28 }),
            u16_at(file, if is_64 { 54 } else { 42 }),
            u16_at(file, if is_64 { 56 } else { 44 }),
        ) else {
            return Err(short);
        };
        let least = if is_64 { 56 } else { 32 };
        if phnum == 0 {
            return Err(ElfError::Corrupt(
                "it has no program headers, so nothing says what to load".into(),
            ));
        }
        if phentsize < least {
            return Err(ElfError::Corrupt(format!(
                "its program headers are {phentsize} bytes long, not {least}"
            )));
        }
        let table_len = u64::from(phentsize) * u64::from(phnum);
        let Some(table) = slice(file, phoff, table_len) else {
            return Err(ElfError::Truncated(
                "the program header table",
                phoff.saturating_add(table_len),
            ));
        };

        let mut elf = Self {
            is_64,
            entry,
            segments: Vec::new(),
            notes: Vec::new(),
        };
        for header in table.chunks_exact(usize::from(phentsize)) {
            elf.program_header(file, header)?;
        }
        if elf.segments.is_empty() {
            return Err(ElfError::Corrupt("it has no loadable segments".into()));
        }
        Ok(elf)
    }

    fn program_header(&mut self, file: &'a [u8], header: &[u8]) -> Result<(), ElfError> {
        let word = |off32, off64| {
            if self.is_64 {
                u64_at(header, off64)
            } else {
                u32_at(header, off32).map(u64::from)
            }
        };
        // The caller has checked that the header is long enough.
        let (Some(kind), Some(offset), Some(vaddr), Some(paddr), Some(filesz), Some(memsz)) = (
            u32_at(header, 0),
            word(4, 8),
            word(8, 16),
            word(12, 24),
            word(16, 32),
            word(20, 40),
        ) else {
            return Err(ElfError::Corrupt("a program header is too short".into()));
        };
        let data = || {
            slice(file, offset, filesz).ok_or(ElfError::Truncated(
                "an ELF segment",
                offset.saturating_add(filesz),
            ))
        };
        match kind {
            PT_LOAD => {
                if filesz > memsz {
                    return Err(ElfError::Corrupt(format!(
                        "a segment has {filesz} bytes in the file but only {memsz} in memory"
                    )));
                }
                if memsz == 0 {
                    return Ok(());
                }
                if self.segments.len() == MAX_SEGMENTS {
                    return Err(ElfError::Corrupt(format!(
                        "it has more than {MAX_SEGMENTS} loadable segments"
                    )));
                }
                if paddr.checked_add(memsz).is_none() || vaddr.checked_add(memsz).is_none() {
                    return Err(ElfError::Corrupt(format!(
                        "a segment of {memsz:#x} bytes at {paddr:#x} leaves the address space"
                    )));
                }
                self.segments.push(Segment {
                    vaddr,
                    paddr,
                    memsz,
                    data: data()?,
                });
            }
            PT_NOTE if self.notes.len() < MAX_SEGMENTS => self.notes.push(data()?),
            _ => {}
        }
        Ok(())
    }

    /// The descriptor of the first note of that owner and type.
    pub(crate) fn note(&self, owner: &[u8], kind: u32) -> Option<&'a [u8]> {
        self.notes()
            .find(|n| n.owner == owner && n.kind == kind)
            .map(|n| n.desc)
    }

    /// Every note. A malformed one ends its segment's list.
    pub(crate) fn notes(&self) -> impl Iterator<Item = Note<'a>> + '_ {
        self.notes
            .iter()
            .flat_map(|segment| Notes { rest: segment })
    }

    /// The error for an entry point that is in no segment.
    pub(crate) fn entry_outside(&self, kind: KernelKind) -> LoadError {
        let reason = format!(
            "its entry point {:#x} is in none of its segments",
            self.entry
        );
        LoadError::Corrupt { kind, reason }
    }

    /// The guest physical address of the entry point: as written when that is
    /// inside a segment's load range, else translated from its virtual range.
    pub(crate) fn physical_entry(&self) -> Option<u64> {
        let inside = |start: u64, s: &Segment<'_>| {
            self.entry
                .checked_sub(start)
                .filter(|offset| *offset < s.memsz)
        };
        if self.segments.iter().any(|s| inside(s.paddr, s).is_some()) {
            return Some(self.entry);
        }
        self.segments
            .iter()
            .find_map(|s| Some(s.paddr + inside(s.vaddr, s)?))
    }
}

/// One ELF note.
pub(crate) struct Note<'a> {
    /// Owner's name without its NUL.
    pub owner: &'a [u8],
    /// Type; the owner says what it means.
    pub kind: u32,
    /// Descriptor.
    pub desc: &'a [u8],
}

struct Notes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Notes<'a> {
    type Item = Note<'a>;

    fn next(&mut self) -> Option<Note<'a>> {
        let name_len = u64::from(u32_at(self.rest, 0)?);
        let desc_len = u64::from(u32_at(self.rest, 4)?);
        let kind = u32_at(self.rest, 8)?;
        // Names and descriptors are padded to 4 bytes in both classes, whatever
        // the gABI says about 8: that is what all toolchains write.
        let desc_at = align_up(12 + name_len, 4)?;
        let owner = slice(self.rest, 12, name_len)?;
        let desc = slice(self.rest, desc_at, desc_len)?;
        let next = usize::try_from(align_up(desc_at + desc_len, 4)?).ok()?;
        self.rest = self.rest.get(next..).unwrap_or(&[]);
        let owner = owner.strip_suffix(b"\0").unwrap_or(owner);
        Some(Note { owner, kind, desc })
    }
}

/// A noun phrase for an ELF file that no loader accepts.
pub(crate) fn describe_refused(file: &[u8]) -> String {
    let class = match u8_at(file, 4) {
        Some(CLASS_32) => "32-bit ",
        Some(CLASS_64) => "64-bit ",
        _ => "",
    };
    let big = u8_at(file, 5) == Some(2);
    let field = |off| {
        array(file, off).map(if big {
            u16::from_be_bytes
        } else {
            u16::from_le_bytes
        })
    };
    let what = match field(16) {
        Some(1) => "object file",
        Some(TYPE_EXEC | TYPE_DYN) => "program",
        Some(4) => "core dump",
        None => return "a truncated ELF file".into(),
        _ => "ELF file of unknown type",
    };
    let machine = match field(18) {
        Some(2 | 18 | 43) => "SPARC",
        Some(MACHINE_386) => "32-bit x86",
        Some(8) => "MIPS",
        Some(20 | 21) => "POWER",
        Some(22) => "S/390",
        Some(40) => "32-bit ARM",
        Some(50) => "Itanium",
        Some(MACHINE_X86_64) => "x86-64",
        Some(183) => "64-bit ARM",
        Some(243) => "RISC-V",
        Some(258) => "LoongArch",
        Some(n) => return format!("a {class}ELF {what} for machine number {n}"),
        None => return "a truncated ELF file".into(),
    };
    let order = if big { "big-endian " } else { "" };
    if is_x86_executable(file) {
        return format!(
            "a {class}ELF {what} for {machine} that is not Linux and has neither a PVH note nor a Multiboot header"
        );
    }
    format!("a {order}{class}ELF {what} for {machine}")
}

#[cfg(test)]
pub(crate) mod tests {
    use alloc::{vec, vec::Vec};

    use super::*;

    /// A segment or note of an ELF file that a test builds.
    pub(crate) struct Part {
        pub kind: u32,
        pub vaddr: u64,
        pub paddr: u64,
        pub extra: u64,
        pub data: Vec<u8>,
    }

    pub(crate) fn load(paddr: u64, data: &[u8], bss: u64) -> Part {
        Part {
            kind: PT_LOAD,
            vaddr: paddr,
            paddr,
            extra: bss,
            data: data.into(),
        }
    }

    pub(crate) fn note(owner: &str, kind: u32, desc: &[u8]) -> Part {
        let mut data = Vec::new();
        for n in [owner.len() as u32 + 1, desc.len() as u32, kind] {
            data.extend(n.to_le_bytes());
        }
        data.extend(owner.as_bytes());
        data.push(0);
        data.resize(data.len().next_multiple_of(4), 0);
        data.extend(desc);
        data.resize(data.len().next_multiple_of(4), 0);
        Part {
            kind: PT_NOTE,
            vaddr: 0,
            paddr: 0,
            extra: 0,
            data,
        }
    }

    /// Writes an x86 ELF executable.
    pub(crate) fn build(is_64: bool, entry: u64, parts: &[Part]) -> Vec<u8> {
        let (eh, ph) = if is_64 { (64usize, 56usize) } else { (52, 32) };
        let word = |v: &mut Vec<u8>, n: u64| {
            if is_64 {
                v.extend(n.to_le_bytes())
            } else {
                v.extend((n as u32).to_le_bytes())
            }
        };
        let mut out = MAGIC.to_vec();
        out.extend([if is_64 { CLASS_64 } else { CLASS_32 }, LITTLE_ENDIAN, 1]);
        out.resize(16, 0);
        out.extend(TYPE_EXEC.to_le_bytes());
        out.extend((if is_64 { MACHINE_X86_64 } else { MACHINE_386 }).to_le_bytes());
        out.extend(1u32.to_le_bytes());
        word(&mut out, entry);
        word(&mut out, eh as u64);
        word(&mut out, 0);
        out.extend(0u32.to_le_bytes());
        for n in [eh as u16, ph as u16, parts.len() as u16, 0, 0, 0] {
            out.extend(n.to_le_bytes());
        }
        let mut at = eh + ph * parts.len();
        for p in parts {
            let memsz = p.data.len() as u64 + p.extra;
            out.extend(p.kind.to_le_bytes());
            if is_64 {
                out.extend(7u32.to_le_bytes());
            }
            for n in [at as u64, p.vaddr, p.paddr, p.data.len() as u64, memsz] {
                word(&mut out, n);
            }
            if !is_64 {
                out.extend(7u32.to_le_bytes());
            }
            word(&mut out, 4);
            at += p.data.len();
        }
        for p in parts {
            out.extend(&p.data);
        }
        out
    }

    #[test]
    fn reads_both_classes() {
        for is_64 in [false, true] {
            let file = build(
                is_64,
                0x10_0004,
                &[load(0x10_0000, b"codecode", 24), note("Own", 7, b"descr")],
            );
            let elf = Elf::parse(&file).unwrap();
            assert_eq!(
                (elf.is_64, elf.entry, elf.segments.len()),
                (is_64, 0x10_0004, 1)
            );
            assert_eq!(elf.segments[0].data, b"codecode");
            assert_eq!(elf.segments[0].memsz, 32);
            assert_eq!(elf.note(b"Own", 7), Some(&b"descr"[..]));
            assert_eq!(elf.note(b"Own", 8), None);
            assert_eq!(elf.physical_entry(), Some(0x10_0004));
        }
    }

    #[test]
    fn entry_is_translated_when_virtual() {
        let mut part = load(0x20_0000, &[0; 16], 0);
        part.vaddr = 0xffff_ffff_8020_0000;
        let file = build(true, 0xffff_ffff_8020_0008, &[part]);
        assert_eq!(Elf::parse(&file).unwrap().physical_entry(), Some(0x20_0008));
        let file = build(true, 0x30_0000, &[load(0x20_0000, &[0; 16], 0)]);
        assert_eq!(Elf::parse(&file).unwrap().physical_entry(), None);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let file = build(
            true,
            0x10_0000,
            &[load(0x10_0000, b"codecode", 0), load(0x11_0000, b"data", 9)],
        );
        assert!(Elf::parse(&file).is_ok());
        for n in 0..file.len() {
            assert!(Elf::parse(&file[..n]).is_err(), "{n}");
        }
    }

    #[test]
    fn impossible_headers_are_errors() {
        let good = build(true, 0x10_0000, &[load(0x10_0000, b"codecode", 0)]);
        let with = |at: usize, bytes: &[u8]| {
            let mut f = good.clone();
            f[at..at + bytes.len()].copy_from_slice(bytes);
            f
        };
        // e_phnum 0; e_phentsize 8; p_memsz < p_filesz; p_paddr near the top; p_offset huge.
        for f in [
            with(56, &[0, 0]),
            with(54, &[8, 0]),
            with(64 + 40, &[1, 0, 0, 0, 0, 0, 0, 0]),
            with(64 + 24, &[0xff; 8]),
            with(64 + 8, &[0xff; 8]),
            with(32, &[0xff; 8]),
            with(56, &[0xff, 0xff]),
        ] {
            assert!(Elf::parse(&f).is_err());
        }
        let many: Vec<Part> = (0..300).map(|i| load(i << 12, b"x", 0)).collect();
        assert!(matches!(
            Elf::parse(&build(true, 0, &many)),
            Err(ElfError::Corrupt(_))
        ));
    }

    #[test]
    fn malformed_notes_end_the_list() {
        let mut part = note("A", 1, b"x");
        part.data.extend([0xff; 12]);
        let file = build(true, 0x1000, &[load(0x1000, b"x", 0), part]);
        assert_eq!(Elf::parse(&file).unwrap().notes().count(), 1);
    }

    #[test]
    fn foreign_files_are_described() {
        let mut f = build(true, 0, &[load(0, b"x", 0)]);
        assert!(
            describe_refused(&f).starts_with("a 64-bit ELF program for x86-64 that is not Linux")
        );
        f[18] = 183;
        assert_eq!(describe_refused(&f), "a 64-bit ELF program for 64-bit ARM");
        f[16] = 1;
        assert_eq!(
            describe_refused(&f),
            "a 64-bit ELF object file for 64-bit ARM"
        );
        f[5] = 2;
        f[16..20].copy_from_slice(&[0, 2, 0, 21]);
        assert_eq!(
            describe_refused(&f),
            "a big-endian 64-bit ELF program for POWER"
        );
        assert_eq!(describe_refused(&f[..10]), "a truncated ELF file");
        assert_eq!(
            describe_refused(&[vec![0x7f], b"ELF".to_vec()].concat()),
            "a truncated ELF file"
        );
    }
}
