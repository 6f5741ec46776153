use super::*;
use alloc::task::Wake;
use caisson_device::testing::{RecordedBytes, RecordedLines, port_read, port_write};
use core::sync::atomic::{AtomicUsize, Ordering};

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Bench {
    uart: Uart,
    lines: Arc<RecordedLines>,
    output: Arc<RecordedBytes>,
    wakes: Arc<Wakes>,
}

impl Bench {
    fn new() -> Self {
        let (lines, line) = RecordedLines::with_line(4);
        let (output, wakes) = (RecordedBytes::new(), Arc::<Wakes>::default());
        let handles = UartHandles {
            line,
            output: output.clone(),
            room: Some(Waker::from(wakes.clone())),
        };
        let mut uart = Uart::new("uart0", 0x3F8, handles);
        uart.reset(ResetKind::PowerOn);
        Self {
            uart,
            lines,
            output,
            wakes,
        }
    }

    /// FIFO on with trigger level 8, interrupts connected.
    fn with_fifo() -> Self {
        let mut bench = Self::new();
        bench.write(2, 0x81);
        bench.write(4, 0x0B);
        bench
    }

    fn read(&mut self, register: u16) -> u8 {
        port_read(&mut self.uart, 0x3F8 + register, 1) as u8
    }

    fn write(&mut self, register: u16, value: u8) {
        port_write(&mut self.uart, 0x3F8 + register, 1, value.into());
    }

    fn line(&self) -> bool {
        self.lines.level(4)
    }

    fn wakes(&self) -> usize {
        self.wakes.0.load(Ordering::SeqCst)
    }
}

#[test]
fn linux_finds_a_16550a() {
    // The probes of the 8250 driver's autoconfig, in its order.
    let mut bench = Bench::new();
    bench.write(1, 0);
    assert_eq!(bench.read(1), 0);
    bench.write(1, 0x0F);
    assert_eq!(bench.read(1) & 0x0F, 0x0F);
    bench.write(1, 0);
    bench.write(4, 0x10 | 0x0A);
    assert_eq!(bench.read(6) & 0xF0, 0x90, "loop-back");
    bench.write(4, 0);
    bench.write(3, 0xBF);
    assert_eq!(bench.read(3), 0xBF);
    bench.write(2, 0);
    bench.write(3, 0);
    bench.write(2, 1);
    assert_eq!(bench.read(2) >> 6, 3, "FIFOs that work");
    bench.write(1, 0x40);
    assert_eq!(bench.read(1), 0, "no sleep or UART-unit bits");
    bench.write(7, 0x5A);
    assert_eq!(bench.read(7), 0x5A);
}

#[test]
fn linux_finds_no_transmit_interrupt_bug() {
    let mut bench = Bench::with_fifo();
    for _ in 0..2 {
        bench.write(1, 0x02);
        assert_eq!(bench.read(2) & 0x0F, 0x02);
        assert_eq!(bench.read(2) & 0x0F, 0x01, "reading it takes it away");
        bench.write(1, 0x00);
    }
}

#[test]
fn bytes_leave_at_once() {
    let mut bench = Bench::with_fifo();
    for byte in b"hello" {
        assert_eq!(bench.read(5), 0x60);
        bench.write(0, *byte);
    }
    assert_eq!(bench.output.take(), b"hello");
}

#[test]
fn each_sent_byte_raises_the_transmit_interrupt_again() {
    let mut bench = Bench::with_fifo();
    bench.write(1, 0x02);
    assert!(bench.line());
    assert_eq!(bench.read(2), 0xC2);
    assert!(!bench.line());
    bench.write(0, b'x');
    assert!(bench.line());
    bench.write(1, 0);
    assert!(!bench.line());
}

#[test]
fn a_full_host_makes_the_guest_wait() {
    let mut bench = Bench::with_fifo();
    bench.write(1, 0x02);
    bench.read(2);
    bench.output.set_full(true);
    for byte in 0..20 {
        bench.write(0, byte);
    }
    assert_eq!(bench.read(5), 0, "neither empty nor idle");
    assert!(!bench.line());
    bench.output.set_full(false);
    bench.uart.output_ready();
    assert_eq!(
        bench.output.take(),
        (0..16).collect::<Vec<u8>>(),
        "the FIFO's worth"
    );
    assert_eq!(bench.read(5), 0x60);
    assert!(bench.line());
}

#[test]
fn received_bytes_interrupt_at_the_trigger_level_or_by_timeout() {
    let mut bench = Bench::with_fifo();
    bench.write(1, 0x01);
    assert_eq!(bench.uart.receive(b"1234567"), 7);
    assert!(bench.line());
    assert_eq!(bench.read(2), 0xCC);
    assert_eq!(bench.uart.receive(b"8"), 1);
    assert_eq!(bench.read(2), 0xC4);
    for byte in b"12345678" {
        assert_eq!(bench.read(5) & 1, 1);
        assert_eq!(bench.read(0), *byte);
    }
    assert!(!bench.line());
    assert_eq!(bench.read(5) & 1, 0);
    assert_eq!(bench.read(0), 0);
}

#[test]
fn refused_bytes_are_asked_for_again() {
    let mut bench = Bench::with_fifo();
    assert_eq!(bench.uart.receive(&[7; 20]), 16);
    assert_eq!(bench.uart.receive(&[7; 20]), 0);
    assert_eq!(bench.wakes(), 0);
    bench.read(0);
    assert_eq!(bench.wakes(), 1);
    bench.read(0);
    assert_eq!(bench.wakes(), 1, "once is enough");
    assert_eq!(bench.uart.receive(&[7; 2]), 2);
    bench.read(0);
    assert_eq!(bench.wakes(), 1);
}

#[test]
fn without_fifo_there_is_room_for_one() {
    let mut bench = Bench::new();
    assert_eq!(bench.uart.receive(b"ab"), 1);
    assert_eq!(bench.read(2), 0x01);
    assert_eq!(bench.read(0), b'a');
    assert_eq!(bench.wakes(), 1);
}

#[test]
fn loop_back_feeds_the_receiver() {
    let mut bench = Bench::with_fifo();
    bench.write(4, 0x1B);
    assert_eq!(bench.uart.receive(b"x"), 0, "cut off");
    // As Linux measures the FIFO.
    for byte in 0..=255 {
        bench.write(0, byte);
    }
    let mut count = 0;
    while bench.read(5) & 1 != 0 {
        bench.read(0);
        count += 1;
    }
    assert_eq!(count, 16);
    assert_eq!(bench.output.take(), b"");
    bench.write(4, 0x0B);
    assert_eq!(bench.wakes(), 1, "the bytes refused can come now");
}

#[test]
fn overruns_are_told_once() {
    let mut bench = Bench::with_fifo();
    bench.write(4, 0x1B);
    (0..17).for_each(|byte| bench.write(0, byte));
    bench.write(1, 0x05);
    assert_eq!(bench.read(2), 0xC6, "line status is most urgent");
    assert_eq!(bench.read(5) & 2, 2);
    assert_eq!(bench.read(5) & 2, 0);
    assert_eq!(bench.read(2), 0xC4);
}

#[test]
fn modem_lines_and_their_changes() {
    let mut bench = Bench::with_fifo();
    assert_eq!(bench.read(6), 0xB0);
    bench.write(4, 0x1F);
    assert_eq!(
        bench.read(6),
        0xF0,
        "all on: only the ring came up, which does not count"
    );
    bench.write(1, 0x08);
    bench.write(4, 0x10);
    assert_eq!(bench.read(2), 0xC0);
    assert_eq!(bench.read(6), 0x0F);
    assert_eq!(bench.read(2), 0xC1);
}

#[test]
fn interrupts_need_out2() {
    let mut bench = Bench::with_fifo();
    bench.write(4, 0x03);
    bench.write(1, 0x02);
    assert!(!bench.line());
    assert_eq!(bench.read(2) & 0xF, 0x02);
    bench.write(1, 0x00);
    bench.write(1, 0x02);
    bench.write(4, 0x0B);
    assert!(bench.line());
}

#[test]
fn the_divisor_hides_behind_its_latch() {
    let mut bench = Bench::new();
    bench.write(3, 0x83);
    bench.write(0, 0x0C);
    bench.write(1, 0x01);
    assert_eq!((bench.read(0), bench.read(1)), (0x0C, 0x01));
    bench.write(3, 0x03);
    assert_eq!((bench.read(0), bench.read(1)), (0, 0));
    assert_eq!(bench.output.take(), b"");
}

#[test]
fn clearing_and_switching_fifos() {
    let mut bench = Bench::with_fifo();
    bench.uart.receive(b"abc");
    bench.write(2, 0x83);
    assert_eq!(bench.read(5) & 1, 0);
    bench.uart.receive(b"abc");
    bench.write(2, 0x00);
    assert_eq!(bench.read(5) & 1, 0);
    bench.output.set_full(true);
    bench.write(2, 0x81);
    bench.write(0, b'x');
    bench.write(2, 0x85);
    assert_eq!(bench.read(5), 0x60);
    bench.output.set_full(false);
    bench.uart.output_ready();
    assert_eq!(bench.output.take(), b"");
}

#[test]
fn a_restored_port_goes_on_sending_and_receiving() {
    let mut bench = Bench::with_fifo();
    bench.write(1, 0x03);
    bench.uart.receive(b"in");
    bench.output.set_full(true);
    bench.write(0, b'o');
    let record = bench.uart.save().unwrap();

    let mut other = Bench::new();
    other.uart.restore(&record).unwrap();
    assert!(other.line());
    assert_eq!(other.wakes(), 1);
    other.uart.output_ready();
    assert_eq!(other.output.take(), b"o");
    assert_eq!((other.read(0), other.read(0)), (b'i', b'n'));
}

#[test]
fn overfull_states_are_refused() {
    let mut bench = Bench::new();
    let mut state = UartState::reset();
    state.receive.extend([0; 17]);
    assert!(matches!(
        bench.uart.restore(&state.to_record().unwrap()),
        Err(StateError::Invalid { .. })
    ));
}
