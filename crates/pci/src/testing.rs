//! A function with every kind of register, wired to fakes: for tests and fuzz targets.

use alloc::{sync::Arc, vec, vec::Vec};

use caisson_device::{
    Access, Claim, Device, Inspector, Lines, Outcome, ResetKind, SaveState, Space, StateError,
    StateRecord,
    testing::{RecordedClaims, RecordedLines, RecordedMsis},
};
use serde::{Deserialize, Serialize};

use crate::{
    BarKind, BarSpec, Capability, Function, FunctionAddress, FunctionHandles, FunctionSpec,
    FunctionState, Identity, InterruptPin, MsixSpec, Place,
};

/// Where the ECAM window of the fakes is.
pub const ECAM: u64 = 0xe000_0000;
/// The line that the pin of a [`Sample`] drives.
pub const LINE: u32 = 17;
/// How many MSI-X vectors a [`Sample`] has.
pub const VECTORS: u16 = 66;

/// A device that is nothing but a function: ports in register 0, MSI-X structures in register 1 (32-bit memory), 1 MiB
/// of 64-bit memory in registers 2 and 3.
pub struct Sample {
    /// The function.
    pub function: Function,
    /// Where its ranges are.
    pub claims: Arc<RecordedClaims>,
    /// What it sent.
    pub msis: Arc<RecordedMsis>,
    /// Its pin.
    pub lines: Arc<RecordedLines>,
}

#[derive(Serialize, Deserialize)]
struct SampleState(FunctionState);

impl SaveState for SampleState {
    const ID: &'static str = "pci-sample";
    const VERSION: u16 = 1;
}

impl Default for Sample {
    fn default() -> Self {
        Self::new()
    }
}

impl Sample {
    /// The device 00:03.0 after a reset.
    pub fn new() -> Self {
        let (claims, msis, lines) = (
            RecordedClaims::new(),
            RecordedMsis::new(),
            RecordedLines::new(),
        );
        let bar = |index, kind, size, address, label| BarSpec {
            index,
            kind,
            size,
            address,
            label,
        };
        let spec = FunctionSpec {
            place: Place {
                address: FunctionAddress::new(3, 0).expect("a function's number"),
                ecam: ECAM,
            },
            identity: Identity {
                vendor: 0x1234,
                device: 0x5678,
                revision: 9,
                class: 0x01_08_02,
                subsystem_vendor: 0xabcd,
                subsystem: 0xef01,
            },
            bars: vec![
                bar(0, BarKind::Io, 32, 0x2000, "ports"),
                bar(1, BarKind::Memory32, 8192, 0xc000_2000, "MSI-X"),
                bar(2, BarKind::Memory64, 1 << 20, 0xc010_0000, "registers"),
            ],
            pin: Some(InterruptPin::A),
            msi: 8,
            msix: Some(MsixSpec {
                vectors: VECTORS,
                bar: 1,
                table: 0,
                pending: 4096,
            }),
            capabilities: vec![Capability {
                id: 9,
                body: vec![6, 0xaa, 0, 0],
                writable: vec![0, 0, 0xff],
            }],
        };
        let handles = FunctionHandles {
            claims: claims.clone(),
            msi: msis.clone(),
            line: Lines::new(lines.clone()).line(LINE).ok(),
        };
        let mut function = Function::new(spec, handles).expect("the spec is sound");
        function.reset();
        Self {
            function,
            claims,
            msis,
            lines,
        }
    }

    /// Reads `len` bytes of configuration space.
    pub fn config(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read_config(offset, &mut data[..len.min(8)]);
        u64::from_le_bytes(data)
    }

    /// Writes `len` bytes of configuration space.
    pub fn set_config(&mut self, offset: u64, len: usize, value: u64) {
        self.function
            .write_config(offset, &value.to_le_bytes()[..len.min(8)]);
    }

    /// The access that a vCPU at `address` makes, by what the device claims and has placed.
    pub fn access(&self, space: Space, address: u64) -> Option<Access> {
        caisson_device::testing::access(self, space, address)
            .or_else(|| self.claims.access(space, address))
    }
}

impl Device for Sample {
    fn name(&self) -> &str {
        "sample"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![self.function.place().claim()]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        match self.function.bar_of(&at) {
            None => self.function.read_config(at.offset, data),
            Some(bar) => {
                let _ = self.function.read_msix(bar, at.offset, data);
            }
        }
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        match self.function.bar_of(&at) {
            None => self.function.write_config(at.offset, data),
            Some(bar) => {
                let _ = self.function.write_msix(bar, at.offset, data);
            }
        }
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.function.reset();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        SampleState(self.function.state()).to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.function.restore(&SampleState::from_record(record)?.0)
    }

    fn inspect(&self, inspector: &mut Inspector) {
        self.function.inspect(inspector);
    }
}

/// Does to a function what `input` says: accesses to configuration space and to the MSI-X structures, signals and moves
/// through saved state, and checks what must hold after each.
///
/// # Panics
/// When it does not hold.
pub fn exercise(input: &[u8]) {
    let mut sample = Sample::new();
    let identity = sample.config(0, 4);
    for step in input.chunks_exact(12) {
        let [operation, vector, o0, o1, value @ ..] = step else {
            return;
        };
        let len = usize::from(operation >> 5) + 1;
        let offset = u64::from(u16::from_le_bytes([*o0, *o1]));
        let mut data = [0; 8];
        data.copy_from_slice(value);
        match operation & 7 {
            0 => sample.function.write_config(offset & 0xff, &data[..len]),
            1 => sample.function.write_config(offset & 0xfff, &data[..len]),
            2 => {
                sample.function.write_msix(1, offset & 0x1fff, &data[..len]);
            }
            3 => {
                sample
                    .function
                    .read_msix(1, offset & 0x1fff, &mut data[..len]);
            }
            4 => sample.function.signal(u16::from(*vector)),
            5 => sample.function.set_intx(vector & 1 != 0),
            6 => {
                let mut fresh = Sample::new();
                caisson_device::testing::check_state(&sample, &mut fresh);
                for region in 0..7 {
                    assert_eq!(sample.claims.get(region), fresh.claims.get(region));
                }
                assert_eq!(sample.lines.level(LINE), fresh.lines.level(LINE));
                sample = fresh;
            }
            _ => sample.function.reset(),
        }
        assert_eq!(sample.config(0, 4), identity, "its identity is fixed");
        let command = sample.config(4, 2);
        for region in 1..7 {
            if let Some(claim) = sample.claims.get(region) {
                let enable = if claim.range.space == Space::Pio {
                    1
                } else {
                    2
                };
                assert!(command & enable != 0, "a range answers while it is off");
                assert!(claim.range.last().is_some());
                assert_eq!(claim.range.base % claim.range.len, 0);
            }
        }
        let quiet = command & 1 << 10 != 0 || sample.function.uses_messages();
        assert!(!(quiet && sample.lines.level(LINE)), "the pin is off");
        let sent = sample.msis.take();
        assert!(sent.is_empty() || command & 4 != 0, "it is no bus master");
    }
}
