//! What is known of a micro-operation besides itself.

use core::num::NonZeroU64;

use super::select::{Compare, Operands};
use crate::uop::Handler;

/// What is known of a micro-operation for the pass over flags, and for fusing.
/// Two words, so that it travels in registers.
#[derive(Clone, Copy)]
pub(crate) struct Note {
    facts: NonZeroU64,
    plain: Option<Handler>,
}

const KILLS: u64 = 1 << 0;
const NEEDS: u64 = 1 << 1;
const COMPARES: u64 = 1 << 2;
const TEST: u64 = 1 << 3;
/// In every note, so that one is never zero.
const ALWAYS: u64 = 1 << 4;
const SIZE: u32 = 8;
const OPERANDS: u32 = 16;

impl Note {
    /// Flags are neither read nor all overwritten, and the block is not left.
    pub(super) const NOTHING: Self = Self::with(0);
    /// Every arithmetic flag is overwritten.
    pub(super) const KILLS: Self = Self::with(KILLS);
    /// Arithmetic flags are read, or the block may be left here, so that they
    /// must be right.
    pub(super) const NEEDS: Self = Self::with(NEEDS);

    const fn with(facts: u64) -> Self {
        Self {
            facts: NonZeroU64::new(ALWAYS | facts).unwrap(),
            plain: None,
        }
    }

    /// See [`Self::KILLS`] and [`Self::NEEDS`].
    pub(super) fn new(kills: bool, needs: bool) -> Self {
        Self::with((u64::from(kills) * KILLS) | (u64::from(needs) * NEEDS))
    }

    /// `plain` is the handler to use where nobody reads the flags.
    pub(super) fn or_plain(self, plain: Option<Handler>) -> Self {
        Self { plain, ..self }
    }

    /// A following Jcc may be fused with `compare`.
    pub(super) fn or_fused(self, compare: Compare) -> Self {
        let operands = match compare.operands {
            Operands::Registers => 0,
            Operands::Immediate => 1,
            Operands::Memory(form) => 2 + u64::from(form),
        };
        let facts = COMPARES
            | (u64::from(compare.test) * TEST)
            | (u64::from(compare.size) << SIZE)
            | (operands << OPERANDS);
        Self {
            facts: self.facts | facts,
            ..self
        }
    }

    pub(super) fn kills_flags(self) -> bool {
        self.facts.get() & KILLS != 0
    }

    pub(super) fn needs_flags(self) -> bool {
        self.facts.get() & NEEDS != 0
    }

    pub(super) fn plain(self) -> Option<Handler> {
        self.plain
    }

    pub(super) fn compare(self) -> Option<Compare> {
        let facts = self.facts.get();
        (facts & COMPARES != 0).then(|| Compare {
            test: facts & TEST != 0,
            size: (facts >> SIZE) as u8,
            operands: match (facts >> OPERANDS) as u8 {
                0 => Operands::Registers,
                1 => Operands::Immediate,
                form => Operands::Memory(form - 2),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read() {
        assert!(!Note::NOTHING.kills_flags() && !Note::NOTHING.needs_flags());
        assert!(Note::KILLS.kills_flags() && !Note::KILLS.needs_flags());
        assert!(Note::new(true, true).needs_flags());
        for operands in [
            Operands::Registers,
            Operands::Immediate,
            Operands::Memory(0),
            Operands::Memory(2),
        ] {
            let note = Note::NEEDS.or_fused(Compare {
                test: true,
                size: 8,
                operands,
            });
            let compare = note.compare().unwrap();
            assert!(compare.test && compare.size == 8 && compare.operands == operands);
            assert!(note.needs_flags() && !note.kills_flags() && note.plain().is_none());
        }
        assert!(Note::KILLS.compare().is_none());
    }
}
