//! Interrupt messages: what an MSI or an IPI asks for, and of whom (SDM "Interrupt Command Register (ICR)",
//! "Message Signalled Interrupts").

/// How a message interrupts its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, at every target.
    Fixed,
    /// The vector, at one of the targets.
    LowestPriority,
    /// System management interrupt; dropped by the targets.
    Smi,
    /// Non-maskable interrupt; the vector is ignored.
    Nmi,
    /// INIT: the target stops and waits for a start-up message.
    Init,
    /// Start-up: a target that waits starts at vector × 4096 in real mode.
    StartUp,
    /// As if the 8259's output were raised: the target acquires the vector from it.
    ExtInt,
}

impl DeliveryMode {
    /// The mode with the three-bit code `bits`; `None` for the reserved one. `ext_int` says whether code 7, which is
    /// ExtINT in MSIs and LVT entries, exists.
    pub(crate) fn from_bits(bits: u32, ext_int: bool) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 if ext_int => Self::ExtInt,
            _ => return None,
        })
    }

    /// Whether the message carries an interrupt vector, which must then be 16 or more.
    pub fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// Which APICs a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// All of them.
    Broadcast,
    /// The one with this id.
    Physical(u32),
    /// Those whose logical destination matches; 8 bits in xAPIC format, 32 bits in x2APIC format.
    Logical(u32),
}

impl Destination {
    /// The destination that an 8-bit field with up to seven extension bits above it names.
    pub(crate) fn from_xapic(field: u32, logical: bool) -> Self {
        match (field, logical) {
            (0xFF, _) => Self::Broadcast,
            (field, true) => Self::Logical(field),
            (field, false) => Self::Physical(field),
        }
    }

    /// The destination that the 32-bit field of an x2APIC names.
    pub(crate) fn from_x2apic(field: u32, logical: bool) -> Self {
        match (field, logical) {
            (u32::MAX, _) => Self::Broadcast,
            (field, true) => Self::Logical(field),
            (field, false) => Self::Physical(field),
        }
    }
}

/// An interrupt on its way to one or more APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The vector; a page number for [`DeliveryMode::StartUp`].
    pub vector: u8,
    /// How the targets are interrupted.
    pub mode: DeliveryMode,
    /// Whether the source is level-triggered, so that the target's EOI is broadcast to the IOAPICs.
    pub level: bool,
    /// For whom.
    pub destination: Destination,
}

impl Message {
    /// The interrupt that a write of `data` to `address` asks for; `None` when the address is not in the interrupt
    /// range 0xFEE00000 to 0xFEEFFFFF, the delivery mode is reserved, or a level is being de-asserted.
    ///
    /// Bits 5 to 11 of the address extend the destination id to 15 bits, as several hypervisors define it; guests
    /// that do not know of it leave them zero.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address & !0x000F_FFFF != 0xFEE0_0000 {
            return None;
        }
        let level = data & (1 << 15) != 0;
        if level && data & (1 << 14) == 0 {
            return None;
        }
        let field = ((address >> 12) & 0xFF) as u32 | (((address >> 5) & 0x7F) << 8) as u32;
        Some(Self {
            vector: data as u8,
            mode: DeliveryMode::from_bits(data >> 8, true)?,
            level,
            destination: Destination::from_xapic(field, address & (1 << 2) != 0),
        })
    }
}

/// The shorthand of an IPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The message's own destination counts.
    None,
    /// Every APIC with the sender.
    AllIncludingSelf,
    /// Every APIC but the sender.
    AllExcludingSelf,
}

/// An IPI that a vCPU has sent, to be handed to [`crate::ApicBus::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// What and, without shorthand, for whom.
    pub message: Message,
    /// For whom instead.
    pub shorthand: Shorthand,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msis_decode() {
        let message = Message::from_msi(0xFEE0_3004, 0xC131).unwrap();
        assert_eq!(
            message,
            Message {
                vector: 0x31,
                mode: DeliveryMode::LowestPriority,
                level: true,
                destination: Destination::Logical(3)
            }
        );
        assert_eq!(
            Message::from_msi(0xFEEF_F000, 0x31).unwrap().destination,
            Destination::Broadcast
        );
        assert_eq!(
            Message::from_msi(0xFEEF_F020, 0x31).unwrap().destination,
            Destination::Physical(0x1FF)
        );
    }

    #[test]
    fn what_is_no_interrupt_is_refused() {
        assert_eq!(Message::from_msi(0xFED0_0000, 0x31), None);
        assert_eq!(Message::from_msi(0x1_FEE0_0000, 0x31), None);
        assert_eq!(
            Message::from_msi(0xFEE0_0000, 0x331),
            None,
            "reserved delivery mode"
        );
        assert_eq!(
            Message::from_msi(0xFEE0_0000, 0x8031),
            None,
            "level de-assert"
        );
    }
}
