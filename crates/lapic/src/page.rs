//! The registers as one page, the form in which hardware-assisted backends exchange them (KVM's `kvm_lapic_state`,
//! the xAPIC register pages of WHP and MSHV): each register's 32 bits at its xAPIC offset.
//!
//! IA32_APIC_BASE and IA32_TSC_DEADLINE travel apart from it; set the former first, the latter after. What the page
//! does not hold (errors not yet latched, the level of LINT0, an ExtINT message) is taken as absent.

use crate::{base::Mode, lapic::Lapic, lvt::Lvt, regs, timer::Time, vectors::VectorSet};

/// The length of the register page in bytes.
pub const PAGE_LEN: usize = 0x400;

fn slot(register: u32) -> core::ops::Range<usize> {
    let start = register as usize * 16;
    start..start + 4
}

fn put(page: &mut [u8; PAGE_LEN], register: u32, value: u32) {
    page[slot(register)].copy_from_slice(&value.to_le_bytes());
}

fn get(page: &[u8; PAGE_LEN], register: u32) -> u32 {
    page[slot(register)]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

impl Lapic {
    /// The registers at `now` as a page. In x2APIC mode the id has 32 bits and the ICR's destination is the whole word
    /// at 0x310.
    pub fn to_page(&mut self, now: Time) -> [u8; PAGE_LEN] {
        let mut page = [0; PAGE_LEN];
        let x2apic = self.mode() == Mode::X2Apic;
        for register in 0..=regs::SELF_IPI {
            let value = match register {
                regs::ID if x2apic => self.state.id,
                regs::ID => self.state.id << 24,
                regs::LDR if x2apic => crate::msr::x2apic_logical_id(self.state.id),
                regs::LDR => self.state.ldr,
                regs::DFR => self.state.dfr,
                regs::ICR => self.state.icr as u32,
                regs::ICR_HIGH => (self.state.icr >> 32) as u32,
                _ => self.read_register(register, now).unwrap_or(0),
            };
            put(&mut page, register, value);
        }
        page
    }

    /// Takes over the registers of a page made at `now`, in the mode that IA32_APIC_BASE says. Bits that do not exist
    /// are dropped; the id is not taken over. Of the version register counts whether EOI broadcasts can be switched
    /// off: software has read it.
    pub fn load_page(&mut self, page: &[u8; PAGE_LEN], now: Time) {
        let x2apic = self.mode() == Mode::X2Apic;
        self.state.reset_registers();
        self.config.directed_eoi = get(page, regs::VERSION) & regs::VERSION_DIRECTED_EOI != 0;
        let svr_writable = self.svr_writable();
        let state = &mut self.state;
        state.tpr = get(page, regs::TPR) as u8;
        if !x2apic {
            state.ldr = get(page, regs::LDR) & 0xFF00_0000;
            state.dfr = get(page, regs::DFR) | regs::DFR_FIXED;
        }
        state.svr = get(page, regs::SVR) & svr_writable;
        let sets: [(&mut VectorSet, u32); 3] = [
            (&mut state.isr, regs::ISR),
            (&mut state.tmr, regs::TMR),
            (&mut state.irr, regs::IRR),
        ];
        for (set, first) in sets {
            for index in 0..8 {
                set.set_register(index, get(page, first + index));
            }
            set.drop_illegal();
        }
        state.esr = get(page, regs::ESR) & 0xFF;
        let high = get(page, regs::ICR_HIGH) & if x2apic { u32::MAX } else { 0xFF00_0000 };
        state.icr = u64::from(high) << 32 | u64::from(get(page, regs::ICR) & regs::ICR_WRITABLE);
        for register in regs::LVT_FIRST..=regs::LVT_LAST {
            if let Some(entry) = Lvt::of_register(register) {
                state.lvt[entry as usize] = get(page, register) & entry.defined();
            }
        }
        state.timer.initial = get(page, regs::TIMER_INITIAL);
        state.timer.divide = get(page, regs::TIMER_DIVIDE) & regs::DIVIDE_WRITABLE;
        self.resume_timer(get(page, regs::TIMER_CURRENT), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Deadline};
    use proptest::prelude::*;

    const T0: Time = Time { nanos: 0, tsc: 0 };

    #[test]
    fn a_page_carries_whether_eoi_broadcasts_can_be_switched_off() {
        for (offered, other) in [(false, true), (true, false)] {
            let config = |directed_eoi| Config {
                directed_eoi,
                ..Config::new(0, true)
            };
            let mut lapic = Lapic::new(config(offered));
            let _ = lapic.write_mmio(0xF0, &0x11FFu32.to_le_bytes(), T0);
            let page = lapic.to_page(T0);
            let mut other = Lapic::new(config(other));
            other.load_page(&page, T0);
            assert_eq!(other.to_page(T0), page);
        }
    }

    #[test]
    fn a_page_carries_the_registers() {
        let mut lapic = Lapic::new(Config::new(2, false));
        for (offset, value) in [
            (0xF0u64, 0x1FFu32),
            (0x320, 0x2_0040),
            (0x350, 0x8700),
            (0x3E0, 0xB),
            (0x380, 5000),
            (0xD0, 0x0400_0000),
            (0xE0, 0),
            (0x80, 0x20),
            (0x310, 0x0300_0000),
        ] {
            let _ = lapic.write_mmio(offset, &value.to_le_bytes(), T0);
        }
        lapic.inject(0x55, true);
        lapic.inject(0x66, false);
        lapic.accept(0x66);
        let later = Time {
            nanos: 1200,
            tsc: 0,
        };
        let page = lapic.to_page(later);
        assert_eq!(get(&page, regs::ID), 0x0200_0000);
        assert_eq!(get(&page, regs::TIMER_CURRENT), 3800);

        let mut other = Lapic::new(Config::new(2, false));
        other.load_page(
            &page,
            Time {
                nanos: 10_000,
                tsc: 0,
            },
        );
        assert_eq!(other.next_timer_deadline(), Some(Deadline::Nanos(13_800)));
        assert_eq!(
            other.to_page(Time {
                nanos: 10_000,
                tsc: 0
            }),
            page
        );
        assert_eq!(other.highest_pending(), lapic.highest_pending());
    }

    #[test]
    fn x2apic_pages_hold_wide_ids() {
        let mut lapic = Lapic::new(Config::new(0x1234, false));
        let _ = lapic
            .set_apic_base(lapic.apic_base() | 1 << 10, T0)
            .unwrap();
        let _ = lapic.write_msr(0x80F, 0x1FF, T0).unwrap();
        let _ = lapic.write_msr(0x830, 0x0000_5678_0000_0041, T0).unwrap();
        let page = lapic.to_page(T0);
        assert_eq!(
            (get(&page, regs::ID), get(&page, regs::ICR_HIGH)),
            (0x1234, 0x5678)
        );
        let mut other = Lapic::new(Config::new(0x1234, false));
        let _ = other
            .set_apic_base(other.apic_base() | 1 << 10, T0)
            .unwrap();
        other.load_page(&page, T0);
        assert_eq!(other.save(), lapic.save());
    }

    proptest! {
        #[test]
        fn any_page_gives_a_state_that_can_be_saved(bytes in prop::collection::vec(any::<u8>(), PAGE_LEN)) {
            let mut lapic = Lapic::new(Config::new(0, true));
            lapic.load_page(&bytes.try_into().unwrap(), T0);
            let mut other = Lapic::new(lapic.config);
            prop_assert_eq!(other.restore(&lapic.save()), Ok(()));
            let page = lapic.to_page(T0);
            other.load_page(&page, T0);
            prop_assert_eq!(other.to_page(T0), page);
        }
    }
}
