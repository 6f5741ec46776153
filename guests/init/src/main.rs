//! The init program of Caisson's small guest.
//!
//! The kernel starts it as process 1 out of the initramfs. It prepares the system (file systems,
//! modules, host name, loopback, addresses for network cards), then either gives the first serial port a shell or runs one
//! command for the host over the second one, and powers the machine off when that is done.
//!
//! It takes from the kernel's command line:
//!
//! | word | meaning |
//! |---|---|
//! | `caisson.exec=1` | run one command for the host instead of a shell |
//! | `caisson.hostname=NAME` | the host name |
//! | `caisson.term=TERM` | the terminal type of the shell |
//! | `caisson.size=COLUMNSxROWS` | the terminal's size |
//!
//! It needs no library and no allocator: system calls are made directly, and the protocol's files
//! are those that the host compiles.
#![no_std]
#![no_main]

mod agent;
mod memory;
mod setup;
mod shell;
mod spawn;
mod sys;
mod text;
#[path = "../../../crates/agent-protocol/src/wire/mod.rs"]
#[allow(dead_code, unused_imports)]
mod wire;

use core::panic::PanicInfo;
use text::Options;

core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {main}",
    "ud2",
    main = sym main,
);

extern "C" fn main() -> ! {
    setup::file_systems();
    let command_line = setup::read_command_line();
    let options = Options::parse(command_line);
    setup::modules();
    setup::network_and_name(&options);
    setup::cards();
    let ending = if options.exec {
        agent::run(&options)
    } else {
        shell::run(&options)
    };
    setup::shut_down(ending)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    text::complain(&[b"init: internal error at line "]);
    let line = info.location().map_or(0, |location| location.line());
    let mut digits = [0; 10];
    text::complain(&[text::decimal(line, &mut digits), b"\n"]);
    setup::shut_down(sys::Ending::PowerOff)
}
