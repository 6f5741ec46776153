//! The walk of the paging structures, and the access-rights check at its end.

use super::{
    Intent, Translation,
    entry::{Slot, bit},
    error_code, reports_fetch,
};
use crate::{
    fault::Fault,
    mem::Privilege,
    state::{Cpu, cr0, cr4, efer},
};

/// Physical-address bits of an 8-byte entry that may be set.
pub(super) fn address_mask(cpu: &Cpu) -> u64 {
    ((1 << u32::from(cpu.phys_bits.clamp(32, 52))) - 1) & !0xfff
}

/// What the entries on the way allow together.
#[derive(Clone, Copy)]
struct Rights {
    /// RW and US of all entries, ANDed.
    all: u64,
    /// XD of any entry.
    no_execute: bool,
}

impl Rights {
    const ALL: Self = Self {
        all: bit::RW | bit::US,
        no_execute: false,
    };

    fn add(&mut self, entry: u64) {
        self.all &= entry;
        self.no_execute |= entry & bit::XD != 0;
    }

    fn user(self) -> bool {
        self.all & bit::US != 0
    }

    /// Whether an access is allowed (Intel SDM Vol. 3 §5.6.1).
    fn allow(self, cpu: &Cpu, intent: Intent, privilege: Privilege) -> bool {
        let user_access = privilege == Privilege::User;
        if user_access && !self.user() {
            return false;
        }
        if intent == Intent::Fetch {
            let smep = !user_access && self.user() && cpu.cr4 & cr4::SMEP != 0;
            return !self.no_execute && !smep;
        }
        let smap = cpu.cr4 & cr4::SMAP != 0;
        if self.user() && smap && privilege == Privilege::Supervisor {
            return false;
        }
        intent == Intent::Read || self.all & bit::RW != 0 || !user_access && cpu.cr0 & cr0::WP == 0
    }
}

/// An access under way: what is needed to say why it failed.
struct Access {
    address: u64,
    intent: Intent,
    privilege: Privilege,
}

impl Access {
    fn fault(&self, cpu: &Cpu, why: u32) -> Fault {
        let mut error = why;
        if self.intent == Intent::Write {
            error |= error_code::W;
        }
        if self.intent == Intent::Fetch && reports_fetch(cpu) {
            error |= error_code::I;
        }
        if self.privilege == Privilege::User {
            error |= error_code::U;
        }
        Fault::page(error, self.address)
    }

    fn not_present(&self, cpu: &Cpu) -> Fault {
        self.fault(cpu, 0)
    }

    fn reserved(&self, cpu: &Cpu) -> Fault {
        self.fault(cpu, error_code::P | error_code::RSVD)
    }

    fn forbidden(&self, cpu: &Cpu) -> Fault {
        self.fault(cpu, error_code::P)
    }
}

/// Why a walk did not end.
enum Stop {
    Fault(Fault),
    /// Another vCPU changed an entry between our look at it and our update.
    Again,
}

impl From<Fault> for Stop {
    fn from(f: Fault) -> Self {
        Self::Fault(f)
    }
}

pub(super) fn walk(
    cpu: &mut Cpu,
    address: u64,
    intent: Intent,
    privilege: Privilege,
) -> Result<Translation, Fault> {
    let access = Access {
        address,
        intent,
        privilege,
    };
    // Each retry means that somebody else made progress: this ends.
    loop {
        let result = if cpu.cr4 & cr4::PAE == 0 {
            walk_32bit(cpu, &access)
        } else {
            walk_wide(cpu, &access)
        };
        match result {
            Ok(t) => return Ok(t),
            Err(Stop::Fault(f)) => return Err(f),
            Err(Stop::Again) => {}
        }
    }
}

/// Marks a table entry as used.
fn mark_table(cpu: &mut Cpu, slot: &Slot, entry: u64) -> Result<(), Stop> {
    slot.set(cpu, entry, bit::A).map(|_| ()).ok_or(Stop::Again)
}

/// Checks the rights, marks the leaf as used, and says what was found.
fn finish(
    cpu: &mut Cpu,
    access: &Access,
    slot: &Slot,
    entry: u64,
    rights: Rights,
    gpa: u64,
    large: bool,
) -> Result<Translation, Stop> {
    if !rights.allow(cpu, access.intent, access.privilege) {
        return Err(access.forbidden(cpu).into());
    }
    let bits = match access.intent {
        Intent::Write => bit::A | bit::D,
        _ => bit::A,
    };
    let entry = slot.set(cpu, entry, bits).ok_or(Stop::Again)?;
    Ok(Translation {
        gpa,
        writable: entry & bit::D != 0 && rights.allow(cpu, Intent::Write, access.privilege),
        user: rights.user(),
        global: entry & bit::G != 0 && cpu.cr4 & cr4::PGE != 0,
        large,
    })
}

/// 32-bit paging: two levels of 4-byte entries, 4 MiB pages with PSE-36.
fn walk_32bit(cpu: &mut Cpu, access: &Access) -> Result<Translation, Stop> {
    let address = access.address;
    let mut rights = Rights::ALL;
    let slot = Slot::find(cpu, cpu.cr3 & 0xffff_f000 | address >> 22 << 2, false);
    let pde = slot.load();
    if pde & bit::P == 0 {
        return Err(access.not_present(cpu).into());
    }
    rights.add(pde);
    if pde & bit::PS != 0 && cpu.cr4 & cr4::PSE != 0 {
        // Bits 20:13 are address bits 39:32, as far as the processor has them.
        let width = u32::from(cpu.phys_bits.clamp(32, 40));
        let high = pde >> 13 & 0xff;
        if pde & 1 << 21 != 0 || high >> (width - 32) != 0 {
            return Err(access.reserved(cpu).into());
        }
        let gpa = high << 32 | pde & 0xffc0_0000 | address & 0x3f_ffff;
        return finish(cpu, access, &slot, pde, rights, gpa, true);
    }
    mark_table(cpu, &slot, pde)?;
    let slot = Slot::find(cpu, pde & 0xffff_f000 | address >> 10 & 0xffc, false);
    let pte = slot.load();
    if pte & bit::P == 0 {
        return Err(access.not_present(cpu).into());
    }
    rights.add(pte);
    let gpa = pte & 0xffff_f000 | address & 0xfff;
    finish(cpu, access, &slot, pte, rights, gpa, false)
}

/// PAE, 4-level and 5-level paging: 8-byte entries, nine index bits a level.
fn walk_wide(cpu: &mut Cpu, access: &Access) -> Result<Translation, Stop> {
    let address = access.address;
    let long = cpu.efer & efer::LMA != 0;
    let frame = address_mask(cpu);
    let mut reserved = 0x000f_ffff_ffff_f000 & !frame;
    if !long {
        // PAE entries have nothing for software in their upper bits.
        reserved |= 0x7ff0_0000_0000_0000;
    }
    if cpu.efer & efer::NXE == 0 {
        reserved |= bit::XD;
    }
    let (mut table, mut level) = if !long {
        let pdpte = cpu.pdptes[(address >> 30 & 3) as usize];
        if pdpte & bit::P == 0 {
            return Err(access.not_present(cpu).into());
        }
        (pdpte & frame, 2)
    } else if cpu.cr4 & cr4::LA57 != 0 {
        (cpu.cr3 & frame, 5)
    } else {
        (cpu.cr3 & frame, 4)
    };
    let mut rights = Rights::ALL;
    loop {
        let shift = 3 + 9 * level;
        let slot = Slot::find(cpu, table | (address >> shift & 0x1ff) << 3, true);
        let entry = slot.load();
        if entry & bit::P == 0 {
            return Err(access.not_present(cpu).into());
        }
        let large = level > 1 && entry & bit::PS != 0;
        let bad = match (large, level) {
            (false, _) => reserved,
            (true, 3) if !cpu.gib_pages => !0,
            // Page frame bits below the page size, but for PAT in bit 12.
            (true, 2 | 3) => reserved | ((1 << shift) - 0x2000),
            (true, _) => !0,
        };
        if entry & bad != 0 {
            return Err(access.reserved(cpu).into());
        }
        rights.add(entry);
        if level == 1 || large {
            let offset = (1 << shift) - 1;
            let gpa = entry & frame & !offset | address & offset;
            return finish(cpu, access, &slot, entry, rights, gpa, large);
        }
        mark_table(cpu, &slot, entry)?;
        table = entry & frame;
        level -= 1;
    }
}
