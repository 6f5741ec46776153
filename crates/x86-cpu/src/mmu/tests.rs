//! Every combination of rights, checked against a model that knows the rules
//! as a table rather than as a walk.

use super::*;
use crate::{
    fault::{Exception, vector},
    testenv::{Machine, RAM, TABLES},
};

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const G: u64 = 0x100;
const NX: u64 = 1 << 63;

const PML4: u64 = TABLES;
const PDPT: u64 = TABLES + 0x1000;
const PD: u64 = TABLES + 0x2000;
const PT: u64 = TABLES + 0x3000;

/// An address whose indices are 1, 2, 3, 4.
const ADDRESS: u64 = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x678;

const ACCESSES: [(Intent, Privilege); 8] = [
    (Intent::Read, Privilege::User),
    (Intent::Write, Privilege::User),
    (Intent::Fetch, Privilege::User),
    (Intent::Read, Privilege::Supervisor),
    (Intent::Write, Privilege::Supervisor),
    (Intent::Fetch, Privilege::Supervisor),
    (Intent::Read, Privilege::SupervisorAc),
    (Intent::Write, Privilege::SupervisorAc),
];

fn four_level() -> Machine {
    let mut m = Machine::long_mode(0);
    m.write_u64(PML4 + 8, PDPT | 7);
    m.write_u64(PDPT + 16, PD | 7);
    m.write_u64(PD + 24, PT | 7);
    m
}

fn fault_of(r: Result<Translation, Fault>) -> Option<(u32, u64)> {
    match r {
        Ok(_) => None,
        Err(Fault::Exception(Exception {
            vector: vector::PF,
            error: Some(e),
            payload,
        })) => Some((e, payload)),
        Err(e) => panic!("{e:?}"),
    }
}

/// What a leaf with `entry`, under a directory entry with `dir`, must do.
fn expected(cpu: &Cpu, dir: u64, entry: u64, intent: Intent, privilege: Privilege) -> Option<u32> {
    let nxe = cpu.efer & efer::NXE != 0;
    let smep = cpu.cr4 & cr4::SMEP != 0;
    let smap = cpu.cr4 & cr4::SMAP != 0;
    let wp = cpu.cr0 & cr0::WP != 0;
    let is_user = privilege == Privilege::User;
    let mut code = 0;
    code |= u32::from(intent == Intent::Write) << 1;
    code |= u32::from(is_user) << 2;
    code |= u32::from(intent == Intent::Fetch && (nxe || smep)) << 4;
    for e in [dir, entry] {
        if e & P == 0 {
            return Some(code);
        }
        if !nxe && e & NX != 0 || e & (1 << 45) != 0 {
            return Some(code | 9);
        }
    }
    let user = dir & entry & U != 0;
    let write = dir & entry & W != 0;
    let exec = (dir | entry) & NX == 0;
    let ok = match (is_user, user, intent) {
        (true, false, _) => false,
        (true, true, Intent::Read) => true,
        (true, true, Intent::Write) => write,
        (true, true, Intent::Fetch) => exec,
        (false, false, Intent::Read) => true,
        (false, false, Intent::Write) => write || !wp,
        (false, false, Intent::Fetch) => exec,
        (false, true, Intent::Fetch) => exec && !smep,
        (false, true, Intent::Read) => !smap || privilege == Privilege::SupervisorAc,
        (false, true, Intent::Write) => {
            (!smap || privilege == Privilege::SupervisorAc) && (write || !wp)
        }
    };
    if ok { None } else { Some(code | 1) }
}

#[test]
fn every_combination_of_rights() {
    let mut m = four_level();
    let bits = |i: u32, list: &[u64]| {
        list.iter()
            .enumerate()
            .fold(0, |v, (n, b)| if i >> n & 1 != 0 { v | b } else { v })
    };
    let mut cases = 0;
    for control in 0..16 {
        m.cpu.cr0 = cr0::PE | cr0::PG | if control & 1 != 0 { cr0::WP } else { 0 };
        m.cpu.cr4 = cr4::PAE
            | if control & 2 != 0 { cr4::SMEP } else { 0 }
            | if control & 4 != 0 { cr4::SMAP } else { 0 };
        m.cpu.efer = efer::LME | efer::LMA | if control & 8 != 0 { efer::NXE } else { 0 };
        for d in 0..32 {
            let dir = PT | bits(d, &[P, W, U, NX, 1 << 45]);
            for e in 0..128 {
                let leaf = 0x5000 | bits(e, &[P, W, U, NX, A, D, 1 << 45]);
                for (intent, privilege) in ACCESSES {
                    m.write_u64(PD + 24, dir);
                    m.write_u64(PT + 32, leaf);
                    let want = expected(&m.cpu, dir, leaf, intent, privilege);
                    let got = translate(&mut m.cpu, ADDRESS, intent, privilege);
                    let what = (control, d, e, intent, privilege);
                    assert_eq!(fault_of(got), want.map(|c| (c, ADDRESS)), "{what:?}");
                    let after = m.read(PT + 32, 8);
                    let marks = match (want, intent) {
                        (Some(_), _) => 0,
                        (None, Intent::Write) => A | D,
                        (None, _) => A,
                    };
                    assert_eq!(after, leaf | marks, "{what:?}");
                    if let Ok(t) = got {
                        assert_eq!(t.gpa, 0x5678);
                        assert_eq!(m.read(PD + 24, 8), dir | A);
                        let w = expected(&m.cpu, dir, leaf, Intent::Write, privilege).is_none();
                        assert_eq!(t.writable, w && after & D != 0, "{what:?}");
                        assert_eq!(t.user, dir & leaf & U != 0);
                    }
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 16 * 32 * 128 * 8);
}

#[test]
fn large_pages_and_their_reserved_bits() {
    let mut m = four_level();
    let at = |m: &mut Machine, a| translate(&mut m.cpu, a, Intent::Read, Privilege::Supervisor);
    m.write_u64(PD + 24, 0x12_3460_0000 | PS | P | 1 << 12);
    assert_eq!(
        at(&mut m, ADDRESS).unwrap().gpa,
        0x12_3460_0000 | 4 << 12 | 0x678
    );
    for bit in 13..21 {
        m.write_u64(PD + 24, PS | P | 1 << bit);
        assert_eq!(fault_of(at(&mut m, ADDRESS)), Some((9, ADDRESS)), "{bit}");
    }
    m.write_u64(PDPT + 16, 0x12_4000_0000 | PS | P | 1 << 12);
    assert_eq!(at(&mut m, ADDRESS).unwrap().gpa, 0x12_4060_4678);
    for bit in 13..30 {
        m.write_u64(PDPT + 16, PS | P | 1 << bit);
        assert_eq!(fault_of(at(&mut m, ADDRESS)), Some((9, ADDRESS)), "{bit}");
    }
    m.write_u64(PML4 + 8, PDPT | P | PS);
    assert_eq!(fault_of(at(&mut m, ADDRESS)), Some((9, ADDRESS)));
    // Bits 52 to 62 belong to software in IA-32e paging.
    m.write_u64(PML4 + 8, PDPT | P | 0x7ff0_0000_0000_0000);
    m.write_u64(PDPT + 16, PS | P);
    assert!(at(&mut m, ADDRESS).is_ok());
}

#[test]
fn physical_address_width_limits_every_entry() {
    let mut m = four_level();
    for (bits, bit, bad) in [
        (40, 39, false),
        (40, 40, true),
        (52, 51, false),
        (36, 36, true),
    ] {
        m.cpu.phys_bits = bits;
        m.write_u64(PT + 32, P | 1 << bit);
        let r = translate(&mut m.cpu, ADDRESS, Intent::Read, Privilege::User);
        let error = if bad { 8 } else { 0 } | 5;
        assert_eq!(fault_of(r), Some((error, ADDRESS)), "{bits} {bit}");
    }
}

#[test]
fn global_needs_the_control_bit() {
    let mut m = four_level();
    m.write_u64(PT + 32, 0x5000 | P | G);
    for pge in [false, true] {
        m.cpu.cr4 = cr4::PAE | if pge { cr4::PGE } else { 0 };
        let t = translate(&mut m.cpu, ADDRESS, Intent::Read, Privilege::Supervisor).unwrap();
        assert_eq!(t.global, pge);
    }
}

#[test]
fn canonical_form_and_five_levels() {
    let mut m = four_level();
    let far = 0x0000_8000_0000_0000;
    let r = translate(&mut m.cpu, far, Intent::Read, Privilege::Supervisor);
    assert_eq!(r, Err(Fault::gp(0)));
    m.cpu.cr4 |= cr4::LA57;
    let pml5 = TABLES + 0x8000;
    m.cpu.cr3 = pml5;
    m.write_u64(pml5 + 5 * 8, PML4 | 7);
    m.write_u64(PT + 32, 0x7000 | P);
    let r = translate(
        &mut m.cpu,
        5 << 48 | ADDRESS,
        Intent::Read,
        Privilege::Supervisor,
    );
    assert_eq!(r.unwrap().gpa, 0x7678);
    let r = translate(&mut m.cpu, 1 << 57, Intent::Read, Privilege::Supervisor);
    assert_eq!(r, Err(Fault::gp(0)));
}

#[test]
fn tables_in_rom_keep_their_bits_and_never_grant_writes() {
    let mut m = four_level();
    m.write_u64(PT + 32, 0x5000 | 7);
    m.env().rom.insert(PT >> 12);
    let t = translate(&mut m.cpu, ADDRESS, Intent::Write, Privilege::User).unwrap();
    assert!(!t.writable);
    assert_eq!(m.read(PT + 32, 8), 0x5000 | 7);
}

#[test]
fn tables_in_holes_read_as_ones() {
    let mut m = four_level();
    m.write_u64(PD + 24, (RAM as u64 + 0x1000) | 7);
    let r = translate(&mut m.cpu, ADDRESS, Intent::Read, Privilege::User);
    assert_eq!(fault_of(r), Some((13, ADDRESS)));
}

#[test]
fn updates_of_watched_tables_are_announced() {
    let mut m = four_level();
    m.write_u64(PT + 32, 0x5000 | P);
    translate(&mut m.cpu, ADDRESS, Intent::Read, Privilege::Supervisor).unwrap();
    assert!(m.env().written.contains(&(PT + 32, 8)));
    m.env().written.clear();
    translate(&mut m.cpu, ADDRESS, Intent::Read, Privilege::Supervisor).unwrap();
    assert!(m.env().written.is_empty());
}

#[test]
fn two_level_paging() {
    let mut m = Machine::protected_mode(0);
    m.cpu.cr0 |= cr0::PG | cr0::WP;
    m.cpu.cr3 = TABLES;
    let address = 3 << 22 | 5 << 12 | 0x9a;
    m.write_u32(TABLES + 12, (TABLES + 0x1000) as u32 | 7);
    m.write_u32(TABLES + 0x1000 + 20, 0xfedc_b000 | 5);
    let t = translate(&mut m.cpu, address, Intent::Read, Privilege::User).unwrap();
    assert_eq!((t.gpa, t.writable, t.user), (0xfedc_b09a, false, true));
    assert_eq!(
        m.read(TABLES + 12, 4) as u32,
        (TABLES + 0x1000) as u32 | 0x27
    );
    assert_eq!(m.read(TABLES + 0x1000 + 20, 4), 0xfedc_b025);
    let r = translate(&mut m.cpu, address, Intent::Write, Privilege::User);
    assert_eq!(fault_of(r), Some((7, address)));
    let r = translate(&mut m.cpu, address, Intent::Fetch, Privilege::User);
    assert!(r.is_ok(), "no execute-disable in 4-byte entries");
    // Without PSE, PS means nothing; with it, bits 39:32 come from 20:13.
    m.write_u32(TABLES + 12, (TABLES + 0x1000) as u32 | 0x87);
    assert!(translate(&mut m.cpu, address, Intent::Read, Privilege::User).is_ok());
    m.cpu.cr4 |= cr4::PSE;
    m.write_u32(TABLES + 12, 0x0140_0000 | 0x5a << 13 | 0x87);
    let t = translate(&mut m.cpu, address, Intent::Write, Privilege::User).unwrap();
    assert_eq!(t.gpa, 0x5a_0140_0000 | 5 << 12 | 0x9a);
    assert!(t.writable);
    m.write_u32(TABLES + 12, 1 << 21 | 0x87);
    let r = translate(&mut m.cpu, address, Intent::Read, Privilege::User);
    assert_eq!(fault_of(r), Some((13, address)));
    m.cpu.phys_bits = 36;
    m.write_u32(TABLES + 12, 1 << 17 | 0x87);
    let r = translate(&mut m.cpu, address, Intent::Read, Privilege::User);
    assert_eq!(fault_of(r), Some((13, address)));
}

#[test]
fn pae_paging() {
    let mut m = Machine::protected_mode(0);
    m.cpu.cr0 |= cr0::PG;
    m.cpu.cr4 |= cr4::PAE;
    let cr3 = TABLES + 0x20;
    m.write_u64(cr3 + 8, PD | 1);
    m.cpu.pdptes = load_pdptes(&mut m.cpu, cr3).unwrap();
    let address = 1 << 30 | 3 << 21 | 4 << 12;
    m.write_u64(PD + 24, PT | 3);
    m.write_u64(PT + 32, 0xab_cdef_0000 | 3);
    let t = translate(&mut m.cpu, address, Intent::Write, Privilege::Supervisor).unwrap();
    assert_eq!(t.gpa, 0xab_cdef_0000);
    let r = translate(&mut m.cpu, 2 << 30, Intent::Read, Privilege::Supervisor);
    assert_eq!(fault_of(r), Some((0, 2 << 30)));
    // Bits for software in 64-bit mode are reserved here.
    m.write_u64(PT + 32, 1 << 52 | 3);
    let r = translate(&mut m.cpu, address, Intent::Read, Privilege::Supervisor);
    assert_eq!(fault_of(r), Some((9, address)));
    // Only what is present is checked when CR3 is loaded.
    m.write_u64(cr3 + 16, 2);
    assert!(load_pdptes(&mut m.cpu, cr3).is_ok());
    for bit in [1, 2, 5, 6, 7, 8, 40, 63] {
        m.write_u64(cr3 + 16, 1 | 1 << bit);
        assert_eq!(load_pdptes(&mut m.cpu, cr3), Err(Fault::gp(0)), "{bit}");
    }
}

#[test]
fn without_paging_addresses_are_physical() {
    let mut m = Machine::new();
    let t = translate(&mut m.cpu, 0x1_0000_1234, Intent::Write, Privilege::User).unwrap();
    assert_eq!((t.gpa, t.writable), (0x1234, true));
}
