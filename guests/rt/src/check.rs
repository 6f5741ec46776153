//! Checks, groups and the result protocol.
//!
//! One line per group; `FAIL GUEST/GROUP: ...` for each failed check (the
//! first few of a group); the last line is `caisson-guest: NAME: ok (N checks)`
//! or `caisson-guest: NAME: FAIL (F of N checks)`. The debug-exit device gets
//! [`SUCCESS`] or [`FAILURE`].

use crate::context::{Context, Exit};
use crate::port::{DEBUG_EXIT, outb};
use crate::println;
use core::fmt::{self, LowerHex};
use core::panic::PanicInfo;

/// Debug-exit value of a guest whose checks all passed (exit status 33).
pub const SUCCESS: u8 = 0x10;
/// Debug-exit value of a guest with a failed check (exit status 35).
pub const FAILURE: u8 = 0x11;
/// Failures printed in full for each group.
const SHOWN: u32 = 12;

/// All results of one guest.
pub struct Suite {
    name: &'static str,
    checks: u64,
    failed: u64,
}

/// A named set of related checks.
pub struct Group<'a> {
    suite: &'a mut Suite,
    name: &'static str,
    checks: u32,
    failed: u32,
    skipped: bool,
}

impl Suite {
    /// A suite without results yet.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            checks: 0,
            failed: 0,
        }
    }

    /// Runs one group and prints its line.
    pub fn group(&mut self, name: &'static str, body: impl FnOnce(&mut Group)) {
        let mut group = Group {
            suite: self,
            name,
            checks: 0,
            failed: 0,
            skipped: false,
        };
        body(&mut group);
        let (checks, failed, skipped) = (group.checks, group.failed, group.skipped);
        self.checks += u64::from(checks);
        self.failed += u64::from(failed);
        match (failed, skipped) {
            (0, true) => println!("{}: {name}: skipped ({checks})", self.name),
            (0, false) => println!("{}: {name}: ok ({checks})", self.name),
            _ => println!("{}: {name}: {failed} of {checks} FAILED", self.name),
        }
    }
}

impl Group<'_> {
    /// Counts a check; `what` is formatted only when it failed.
    pub fn check(&mut self, ok: bool, what: fmt::Arguments) -> bool {
        self.checks += 1;
        if !ok {
            self.failed += 1;
            if self.failed <= SHOWN {
                println!("FAIL {}/{}: {what}", self.suite.name, self.name);
            }
        }
        ok
    }

    /// Checks that a condition holds.
    pub fn that(&mut self, what: &str, ok: bool) -> bool {
        self.check(ok, format_args!("{what}"))
    }

    /// Checks that a value is as expected; both are printed in hexadecimal.
    pub fn eq<T: PartialEq + LowerHex>(&mut self, what: &str, got: T, want: T) -> bool {
        self.check(
            got == want,
            format_args!("{what}: got {got:#x}, want {want:#x}"),
        )
    }

    /// As [`Self::eq`] with a formatted description.
    pub fn eqf<T: PartialEq + LowerHex>(&mut self, what: fmt::Arguments, got: T, want: T) -> bool {
        self.check(
            got == want,
            format_args!("{what}: got {got:#x}, want {want:#x}"),
        )
    }

    /// Enters a context and checks how and where it was left.
    pub fn run(&mut self, what: &str, context: &mut Context, want: Exit, rip: u64) -> bool {
        let got = context.enter();
        let at = context.rip;
        self.check(
            got == want && at == rip,
            format_args!("{what}: got {got} at {at:#x}, want {want} at {rip:#x}"),
        )
    }

    /// Notes that (the rest of) the group does not apply to this machine.
    pub fn skip(&mut self, why: &str) {
        self.skipped = true;
        println!("{}: {}: skip: {why}", self.suite.name, self.name);
    }
}

/// Prints the final line and ends the VM.
pub fn finish(suite: &Suite) -> ! {
    if suite.failed == 0 {
        println!(
            "caisson-guest: {}: ok ({} checks)",
            suite.name, suite.checks
        );
        exit(SUCCESS)
    } else {
        println!(
            "caisson-guest: {}: FAIL ({} of {} checks)",
            suite.name, suite.failed, suite.checks
        );
        exit(FAILURE)
    }
}

/// Reports a panic as the guest's failure.
pub fn panicked(name: &str, info: &PanicInfo) -> ! {
    println!("caisson-guest: {name}: FAIL ({info})");
    exit(FAILURE)
}

/// Writes the debug-exit device; halts for good where there is none.
pub fn exit(code: u8) -> ! {
    outb(DEBUG_EXIT, code);
    loop {
        crate::cpu::cli();
        crate::cpu::hlt();
    }
}
