//! Each device of the chipset wired to fakes, for tests and fuzz targets that drive all of them alike.

use alloc::{boxed::Box, sync::Arc, vec};

use caisson_device::{
    Device, Lines, ResetKind,
    testing::{ManualTime, RecordedBytes, RecordedLines, RecordedMsis, RecordedPower},
};
use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind,
    host::{HugePages, Mapping},
};

use crate::{
    acpi_pm::{AcpiPm, AcpiPmConfig, AcpiPmHandles},
    config_ports::{ConfigAccess, ConfigPorts},
    debug::{DebugCon, DebugExit, PostCode},
    fw_cfg::{FwCfg, Items},
    i8042::I8042,
    interrupts::{InterruptHub, IntrOutput},
    pit::{Pit, PitHandles},
    power::ResetPorts,
    rtc::{Rtc, RtcConfig, RtcHandles},
    uart::{Uart, UartHandles},
};

/// How a device of this kind is made on a given clock, in its power-on state.
pub type Make = fn(&Arc<ManualTime>) -> Box<dyn Device>;

/// All devices of the chipset by name.
pub const DEVICES: [(&str, Make); 11] = [
    ("acpi-pm", acpi_pm),
    ("config-ports", |_| {
        ready(ConfigPorts::new(
            Arc::new(NoFunctions),
            RecordedPower::new(),
        ))
    }),
    ("debug-exit", |_| {
        ready(DebugExit::new(DebugExit::PORT, RecordedPower::new()))
    }),
    ("debugcon", |_| {
        ready(DebugCon::new(DebugCon::PORT, RecordedBytes::new()))
    }),
    ("fw-cfg", fw_cfg),
    ("i8042", i8042),
    ("interrupts", |_| {
        ready(InterruptHub::new(
            RecordedMsis::new(),
            Arc::new(NoProcessor),
        ))
    }),
    ("pit", pit),
    ("post-code", |_| ready(PostCode::new())),
    ("reset-ports", |_| {
        ready(ResetPorts::new(RecordedPower::new()))
    }),
    ("rtc", rtc),
];

struct NoFunctions;

impl ConfigAccess for NoFunctions {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

struct NoProcessor;

impl IntrOutput for NoProcessor {
    fn set_intr(&self, _: bool) {}
}

fn ready(mut device: impl Device + 'static) -> Box<dyn Device> {
    device.reset(ResetKind::PowerOn);
    Box::new(device)
}

/// The device of [`DEVICES`] that is called `name`.
///
/// # Panics
/// When there is none.
pub fn make(name: &str, time: &Arc<ManualTime>) -> Box<dyn Device> {
    let (_, make) = DEVICES
        .iter()
        .find(|(other, _)| *other == name)
        .expect("a device's name");
    make(time)
}

fn acpi_pm(time: &Arc<ManualTime>) -> Box<dyn Device> {
    let handles = AcpiPmHandles {
        sci: RecordedLines::with_line(9).1,
        clock: time.clone(),
        timer: time.timer(0),
        power: RecordedPower::new(),
    };
    ready(AcpiPm::new(AcpiPmConfig::default(), handles))
}

fn fw_cfg(_: &Arc<ManualTime>) -> Box<dyn Device> {
    const LEN: u64 = 1 << 20;
    let mapping = Mapping::new("fw-cfg-test", LEN, HugePages::Off).expect("a megabyte of memory");
    let region = mapping.region("ram", Gpa(0), 0, LEN, RegionKind::Ram);
    let memory = GuestMemory::new(vec![region]).expect("one region");
    let mut items = Items::new();
    items
        .add_file("bootorder", Arc::new(*b"disk"))
        .expect("a file");
    items
        .add_writable_file("etc/note", vec![0; 64])
        .expect("a file");
    ready(FwCfg::new(items, MemoryView::new(memory)))
}

fn i8042(_: &Arc<ManualTime>) -> Box<dyn Device> {
    let mut lines = Lines::new(RecordedLines::new());
    let mut line = |number| lines.line(number).expect("a line");
    ready(I8042::new(line(1), line(12), RecordedPower::new()))
}

fn pit(time: &Arc<ManualTime>) -> Box<dyn Device> {
    let line = RecordedLines::with_line(0).1;
    ready(Pit::new(PitHandles {
        line,
        clock: time.clone(),
        timer: time.timer(0),
    }))
}

fn rtc(time: &Arc<ManualTime>) -> Box<dyn Device> {
    let [periodic, update] = RtcHandles::TIMER_IDS.map(|id| time.timer(id));
    let handles = RtcHandles {
        line: RecordedLines::with_line(8).1,
        clock: time.clone(),
        wall: time.clone(),
        periodic,
        update,
    };
    ready(Rtc::new(handles, RtcConfig::default()))
}

/// A serial port, and its output to make full.
pub fn uart() -> (Uart, Arc<RecordedBytes>) {
    let output = RecordedBytes::new();
    let handles = UartHandles {
        line: RecordedLines::with_line(4).1,
        output: output.clone(),
        room: None,
    };
    let mut uart = Uart::new("uart0", 0x3F8, handles);
    uart.reset(ResetKind::PowerOn);
    (uart, output)
}
