//! Two cascaded 8259A interrupt controllers (Intel 8259A data sheet) with edge/level control registers (82371
//! PIIX data sheet, "ELCR1/ELCR2").

use caisson_device::Inspector;
use serde::{Deserialize, Serialize};

/// The input of the first chip that the second one is wired to.
const CASCADE: u8 = 2;
/// Inputs that cannot be made level-triggered: timer, keyboard, cascade; clock, coprocessor.
const EDGE_ONLY: [u8; 2] = [0b0000_0111, 0b0010_0001];

/// One 8259A's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    /// Requests: latched edges and the levels of level-triggered inputs.
    irr: u8,
    /// In service.
    isr: u8,
    /// Masked inputs.
    imr: u8,
    /// The levels of the inputs.
    pins: u8,
    /// Which inputs are level-triggered.
    elcr: u8,
    /// Bits 7 to 3 of the vectors.
    vector_base: u8,
    /// The input with the lowest priority, 7 unless rotated.
    lowest: u8,
    init: Init,
    /// ICW1 announced an ICW4.
    needs_icw4: bool,
    /// ICW1 said that there is no cascade, so that ICW3 is skipped.
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    /// Reads of the command port give ISR instead of IRR.
    read_isr: bool,
    /// The next read is a poll.
    poll: bool,
}

/// Which initialisation command word comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Init {
    Done,
    Icw2,
    Icw3,
    Icw4,
}

impl Chip {
    const RESET: Self = Self {
        irr: 0,
        isr: 0,
        imr: 0xFF,
        pins: 0,
        elcr: 0,
        vector_base: 0,
        lowest: 7,
        init: Init::Done,
        needs_icw4: false,
        single: false,
        auto_eoi: false,
        rotate_on_auto_eoi: false,
        special_mask: false,
        special_fully_nested: false,
        read_isr: false,
        poll: false,
    };

    fn set_pin(&mut self, pin: u8, level: bool) {
        let bit = 1 << pin;
        let rises = level && self.pins & bit == 0;
        self.pins = if level {
            self.pins | bit
        } else {
            self.pins & !bit
        };
        if self.elcr & bit != 0 {
            self.irr = (self.irr & !bit) | (self.pins & bit);
        } else if rises {
            self.irr |= bit;
        }
    }

    /// The rank of the most urgent input in `set`, 0 the highest; 8 when the set is empty.
    fn rank(&self, set: u8) -> u8 {
        (0..8)
            .find(|rank| set & 1 << self.input(*rank) != 0)
            .unwrap_or(8)
    }

    fn input(&self, rank: u8) -> u8 {
        (self.lowest + 1 + rank) & 7
    }

    /// The input that the chip asks for an interrupt for. `cascade` is whether the second chip asks.
    fn request(&self, cascade: bool) -> Option<u8> {
        let irr = if cascade {
            self.irr | 1 << CASCADE
        } else {
            self.irr
        };
        let rank = self.rank(irr & !self.imr);
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && cascade {
            in_service &= !(1 << CASCADE);
        }
        (rank < self.rank(in_service)).then(|| self.input(rank))
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            let Chip { pins, elcr, .. } = *self;
            *self = Self {
                pins,
                elcr,
                irr: pins & elcr,
                imr: 0,
                vector_base: self.vector_base,
                init: Init::Icw2,
                needs_icw4: value & 1 != 0,
                single: value & 2 != 0,
                ..Self::RESET
            };
        } else if value & 0x08 != 0 {
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let level = value & 7;
        match (specific, eoi) {
            (false, false) => self.rotate_on_auto_eoi = rotate,
            (false, true) => {
                let rank = self.rank(self.isr);
                if rank < 8 {
                    let input = self.input(rank);
                    self.isr &= !(1 << input);
                    if rotate {
                        self.lowest = input;
                    }
                }
            }
            (true, eoi) => {
                if eoi {
                    self.isr &= !(1 << level);
                }
                if rotate {
                    self.lowest = level;
                }
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_cascade = if self.needs_icw4 {
            Init::Icw4
        } else {
            Init::Done
        };
        self.init = match self.init {
            Init::Done => {
                self.imr = value;
                Init::Done
            }
            Init::Icw2 => {
                self.vector_base = value & 0xF8;
                if self.single {
                    after_cascade
                } else {
                    Init::Icw3
                }
            }
            Init::Icw3 => after_cascade,
            Init::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                Init::Done
            }
        };
    }

    fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .hex("irr", self.irr)
            .hex("isr", self.isr)
            .hex("imr", self.imr)
            .hex("elcr", self.elcr)
            .hex("vector base", self.vector_base)
            .bool("auto EOI", self.auto_eoi)
            .bool("initialised", self.init == Init::Done);
    }
}

/// The saved state of a [`PicPair`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    chips: [Chip; 2],
}

/// Two 8259A: inputs 0 to 7 at the first, 8 to 15 at the second, whose output is input 2 of the first.
#[derive(Clone, Debug)]
pub struct PicPair {
    chips: [Chip; 2],
}

impl Default for PicPair {
    fn default() -> Self {
        Self {
            chips: [Chip::RESET; 2],
        }
    }
}

impl PicPair {
    /// Returns to the state after power-on. The levels of the inputs stay: they are their drivers' business.
    pub fn reset(&mut self) {
        for chip in &mut self.chips {
            *chip = Chip {
                pins: chip.pins,
                ..Chip::RESET
            };
        }
    }

    /// Drives input `irq`, 0 to 15 except 2.
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        if irq != CASCADE
            && let Some(chip) = self.chips.get_mut(usize::from(irq >> 3))
        {
            chip.set_pin(irq & 7, level);
        }
    }

    /// Whether the pair asks for an interrupt: its INTR output.
    pub fn output(&self) -> bool {
        self.chips[0].request(self.slave_request()).is_some()
    }

    fn slave_request(&self) -> bool {
        self.chips[1].request(false).is_some()
    }

    /// The interrupt-acknowledge cycle: takes the most urgent request and gives its vector. Without a request it is
    /// input 7's, as on hardware (a "spurious" interrupt).
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.chips[0].request(self.slave_request()) else {
            return self.chips[0].vector_base | 7;
        };
        self.chips[0].acknowledge(input);
        if input != CASCADE {
            return self.chips[0].vector_base | input;
        }
        let slave = &mut self.chips[1];
        match slave.request(false) {
            Some(input) => {
                slave.acknowledge(input);
                slave.vector_base | input
            }
            None => slave.vector_base | 7,
        }
    }

    /// Reads a register: `chip` 0 or 1, `data` the odd port.
    pub(super) fn read(&mut self, chip: usize, data: bool) -> u8 {
        let cascade = chip == 0 && self.slave_request();
        let chip = &mut self.chips[chip & 1];
        if core::mem::take(&mut chip.poll) {
            return match chip.request(cascade) {
                Some(input) => {
                    chip.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (data, chip.read_isr) {
            (true, _) => chip.imr,
            (false, true) => chip.isr,
            (false, false) => chip.irr | u8::from(cascade) << CASCADE,
        }
    }

    /// Writes a register.
    pub(super) fn write(&mut self, chip: usize, data: bool, value: u8) {
        let chip = &mut self.chips[chip & 1];
        if data {
            chip.write_data(value)
        } else {
            chip.write_command(value)
        }
    }

    /// The edge/level control register of `chip`.
    pub(super) fn elcr(&self, chip: usize) -> u8 {
        self.chips[chip & 1].elcr
    }

    /// Sets the edge/level control register of `chip`.
    pub(super) fn set_elcr(&mut self, chip: usize, value: u8) {
        let edge_only = EDGE_ONLY[chip & 1];
        let chip = &mut self.chips[chip & 1];
        let new = value & !edge_only;
        let changed = chip.elcr ^ new;
        chip.elcr = new;
        chip.irr = (chip.irr & !changed) | (chip.pins & changed & new);
    }

    pub(super) fn save(&self) -> PicState {
        PicState { chips: self.chips }
    }

    /// Takes over a saved state; `None` when no pair can be in it.
    pub(super) fn restore(&mut self, state: &PicState) -> Option<()> {
        for (chip, edge_only) in state.chips.iter().zip(EDGE_ONLY) {
            if chip.lowest > 7 || chip.vector_base & 7 != 0 || chip.elcr & edge_only != 0 {
                return None;
            }
        }
        self.chips = state.chips;
        Some(())
    }

    pub(super) fn inspect(&self, inspector: &mut Inspector) {
        inspector.bool("INTR", self.output());
        inspector.child("master", |inspector| self.chips[0].inspect(inspector));
        inspector.child("slave", |inspector| self.chips[1].inspect(inspector));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As PC firmware and Linux do: vectors from 0x20, all inputs unmasked.
    fn initialised() -> PicPair {
        let mut pic = PicPair::default();
        for (chip, base) in [(0, 0x20), (1, 0x28)] {
            pic.write(chip, false, 0x11);
            pic.write(chip, true, base);
            pic.write(chip, true, if chip == 0 { 4 } else { 2 });
            pic.write(chip, true, 1);
            pic.write(chip, true, 0);
        }
        pic
    }

    fn eoi(pic: &mut PicPair, chip: usize) {
        pic.write(chip, false, 0x20);
    }

    #[test]
    fn after_power_on_everything_is_masked() {
        let mut pic = PicPair::default();
        pic.set_irq(1, true);
        assert!(!pic.output());
        assert_eq!(pic.read(0, true), 0xFF);
    }

    #[test]
    fn an_edge_is_served_once() {
        let mut pic = initialised();
        pic.set_irq(1, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x21);
        assert!(!pic.output());
        eoi(&mut pic, 0);
        assert!(!pic.output(), "still high, but no new edge");
        pic.set_irq(1, false);
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x21);
    }

    #[test]
    fn a_level_is_served_until_it_falls() {
        let mut pic = initialised();
        pic.set_elcr(1, 0x08);
        pic.set_irq(11, true);
        assert_eq!(pic.acknowledge(), 0x2B);
        eoi(&mut pic, 1);
        eoi(&mut pic, 0);
        assert!(pic.output());
        pic.set_irq(11, false);
        assert!(!pic.output());
    }

    #[test]
    fn lower_inputs_wait_for_the_end_of_higher_ones() {
        let mut pic = initialised();
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x24);
        pic.set_irq(5, true);
        assert!(!pic.output());
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x21);
        eoi(&mut pic, 0);
        assert!(!pic.output());
        eoi(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn the_cascade_has_the_rank_of_input_two() {
        let mut pic = initialised();
        pic.set_irq(8, true);
        pic.set_irq(3, true);
        assert_eq!(pic.read(0, false), 0x0C, "IRR shows the cascade");
        assert_eq!(pic.acknowledge(), 0x28);
        pic.write(0, false, 0x0B);
        pic.write(1, false, 0x0B);
        assert_eq!(
            (pic.read(0, false), pic.read(1, false)),
            (4, 1),
            "both ISRs"
        );
        eoi(&mut pic, 1);
        eoi(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x23);
    }

    #[test]
    fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
        let mut pic = initialised();
        pic.write(0, false, 0x11);
        for value in [0x20, 4, 0x11, 0] {
            pic.write(0, true, value);
        }
        pic.set_irq(12, true);
        assert_eq!(pic.acknowledge(), 0x2C);
        pic.set_irq(9, true);
        assert_eq!(pic.acknowledge(), 0x29);
    }

    #[test]
    fn nothing_requested_is_the_spurious_vector() {
        let mut pic = initialised();
        assert_eq!(pic.acknowledge(), 0x27);
        pic.write(0, false, 0x0B);
        assert_eq!(pic.read(0, false), 0, "and nothing is in service");
    }

    #[test]
    fn a_masked_edge_stays_requested() {
        let mut pic = initialised();
        pic.write(0, true, 0x02);
        pic.set_irq(1, true);
        pic.set_irq(1, false);
        assert!(!pic.output());
        pic.write(0, true, 0);
        assert_eq!(pic.acknowledge(), 0x21);
    }

    #[test]
    fn automatic_end_of_interrupt_and_rotation() {
        let mut pic = initialised();
        pic.write(0, false, 0x11);
        for value in [0x20, 4, 0x03, 0] {
            pic.write(0, true, value);
        }
        pic.write(0, false, 0x80);
        for irq in [1, 3, 4] {
            pic.set_irq(irq, true);
        }
        assert_eq!(pic.acknowledge(), 0x21);
        pic.set_irq(1, false);
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x23, "input 1 has become the lowest");
        assert_eq!(pic.acknowledge(), 0x24);
        assert_eq!(pic.acknowledge(), 0x21);
    }

    #[test]
    fn specific_commands() {
        let mut pic = initialised();
        pic.write(0, false, 0xC0 | 4);
        pic.set_irq(4, true);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x25, "input 5 now ranks first");
        pic.write(0, false, 0x60 | 5);
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn special_mask_mode_lets_all_unmasked_inputs_through() {
        let mut pic = initialised();
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x21);
        pic.set_irq(6, true);
        assert!(!pic.output());
        pic.write(0, true, 0x02);
        pic.write(0, false, 0x68);
        assert_eq!(pic.acknowledge(), 0x26);
        pic.write(0, false, 0x48);
        assert!(!pic.output());
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = initialised();
        pic.set_irq(6, true);
        pic.write(0, false, 0x0C);
        assert_eq!(pic.read(0, false), 0x86);
        assert!(!pic.output());
        pic.write(0, false, 0x0C);
        assert_eq!(pic.read(0, false), 0);
        assert_eq!(pic.read(0, true), 0, "only one read polls");
    }

    #[test]
    fn timer_keyboard_and_cascade_stay_edge_triggered() {
        let mut pic = initialised();
        pic.set_elcr(0, 0xFF);
        pic.set_elcr(1, 0xFF);
        assert_eq!((pic.elcr(0), pic.elcr(1)), (0xF8, 0xDE));
    }

    #[test]
    fn impossible_states_are_refused() {
        let mut pic = initialised();
        let good = pic.save();
        assert!(pic.restore(&good).is_some());
        let spoil: [fn(&mut Chip); 3] = [
            |chip| chip.lowest = 8,
            |chip| chip.vector_base = 0x21,
            |chip| chip.elcr = 1,
        ];
        for spoil in spoil {
            let mut state = good.clone();
            spoil(&mut state.chips[0]);
            assert!(pic.restore(&state).is_none());
        }
    }
}
