//! Which of the decoder's `Code`s are executed, against the CPUID that the guest
//! sees: an instruction runs only if its features are announced, and whatever
//! is announced runs.

use caisson_x86_cpu::{
    cpuid::{self, ANNOUNCED, Features, Machine},
    sys,
    vector::Unit,
};
use iced_x86::{Code, CpuidFeature, EncodingKind};

/// Features whose instructions are all executed here or by `sys`; the rest of
/// the announced ones are part of the base integer set.
fn announced(features: &Features) -> Vec<CpuidFeature> {
    ANNOUNCED
        .iter()
        .map(|&(f, _)| f)
        .filter(|&f| features.contains(f))
        .collect()
}

/// Codes that only an assembler knows, or that other features than the
/// guest's also claim.
fn is_real(code: Code) -> bool {
    let op = code.op_code();
    op.is_instruction()
        && !op.fwait()
        && op.is_available_in_mode(64)
        && matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
}

#[test]
fn announced_features_are_executed_and_no_other() {
    let features = cpuid::host_features();
    let unit = Unit::new(features);
    let announced = announced(&features);
    let (mut executed, mut refused) = (Vec::new(), Vec::new());
    let mut missing = Vec::new();
    let mut unannounced = Vec::new();
    for code in Code::values().filter(|&c| is_real(c)) {
        let wanted = code.cpuid_features();
        let offered = features.contains_all(wanted);
        let runs = unit.executes(code) || sys::handles(code);
        if runs {
            executed.push(code);
        } else {
            refused.push(code);
        }
        let special = wanted.iter().any(|f| announced.contains(f));
        if offered && special && !runs {
            missing.push(code);
        }
        let hint = {
            let op = code.op_code();
            op.is_nop() || op.is_reserved_nop()
        } || format!("{code:?}").starts_with("Prefetch")
            || format!("{code:?}").starts_with("Endbr")
            || format!("{code:?}").starts_with("Rdssp")
            || format!("{code:?}").starts_with("Cldemote");
        if unit.executes(code) && !offered && !hint {
            unannounced.push(code);
        }
    }
    println!("executed by vector and sys: {executed:?}");
    println!("left to the integer handlers, or #UD: {refused:?}");
    assert!(
        unannounced.is_empty(),
        "run without their feature: {unannounced:?}"
    );
    assert!(
        missing.is_empty(),
        "announced but not executed: {missing:?}"
    );
}

#[test]
fn hidden_features_do_not_run_even_on_a_host_that_has_them() {
    let unit = Unit::new(Features::all());
    for code in Code::values() {
        let hidden = code.cpuid_features().iter().any(|f| {
            let f = format!("{f:?}");
            f.starts_with("AVX512")
                || f.starts_with("AMX")
                || [
                    "RTM", "HLE", "CET_SS", "PKU", "SSE4A", "XOP", "FMA4", "D3NOW", "MPX",
                    "CLZERO", "MONITOR", "WAITPKG", "ENQCMD", "UINTR", "KL",
                ]
                .contains(&f.as_str())
        });
        let name = format!("{code:?}");
        let hint = name.starts_with("Rdssp") || name.starts_with("Prefetch");
        assert!(!hidden || hint || !unit.executes(code), "{code:?}");
    }
}

#[test]
fn a_masked_feature_takes_its_instructions_along() {
    for f in [
        CpuidFeature::AVX2,
        CpuidFeature::BMI2,
        CpuidFeature::AES,
        CpuidFeature::SHA,
        CpuidFeature::SSE4_1,
    ] {
        let mut features = Features::all();
        features.remove(f);
        let unit = Unit::new(features);
        for code in Code::values().filter(|c| c.cpuid_features().contains(&f)) {
            assert!(!unit.executes(code), "{code:?} without {f:?}");
        }
    }
}

#[test]
fn the_table_is_consistent() {
    let machine = Machine {
        vcpus: 6,
        tsc_hz: 2_700_000_000,
        apic_timer_hz: 1_000_000_000,
        la57: false,
    };
    let table = cpuid::table(cpuid::host, &machine);
    let read = |leaf, subleaf| cpuid::lookup(&table, leaf, subleaf);
    // TSC frequency = crystal × EBX ÷ EAX.
    let [a, b, c, _] = read(0x15, 0);
    let said = u64::from(c) * u64::from(b) / u64::from(a);
    assert!(
        said.abs_diff(machine.tsc_hz) * 1000 < machine.tsc_hz,
        "{said} Hz"
    );
    // Six vCPUs need three bits of APIC id.
    assert_eq!(read(0xb, 1)[..3], [3, 6, 0x201]);
    assert_eq!(read(1, 0)[1] >> 16 & 0xff, 8);
    assert_ne!(read(1, 0)[2] >> 31, 0, "hypervisor bit");
    // The XSAVE area holds what XCR0 can enable, and no more.
    let [xcr0, _, size, high] = read(0xd, 0);
    assert_eq!((u64::from(xcr0) & !7, high), (0, 0));
    assert_eq!(size, if xcr0 & 4 != 0 { 832 } else { 576 });
    let vcpu = cpuid::VcpuState {
        apic_id: 5,
        osxsave: true,
        xcr0: 3,
    };
    let view = |leaf, subleaf| cpuid::for_vcpu(leaf, subleaf, read(leaf, subleaf), &vcpu);
    assert_eq!(view(1, 0)[1] >> 24, 5);
    assert_ne!(view(1, 0)[2] >> 27 & 1, 0);
    assert_eq!(view(0xb, 0)[3], 5);
    assert_eq!(view(0xd, 0)[1], 576);
    // Nothing beyond the highest leaf but what the highest says, or zeros.
    assert!(matches!(read(0x1000, 0), [0, 0, 0, 0]) || read(0x1000, 0) == read(0x16, 0));
    // Hidden: VMX, MONITOR, RTM, HLE, AVX-512F, PKU, CET, PMU.
    assert_eq!(read(1, 0)[2] & (1 << 5 | 1 << 3), 0);
    assert_eq!(read(7, 0)[1] & (1 << 4 | 1 << 11 | 1 << 16), 0);
    assert_eq!(read(7, 0)[2] & (1 << 3 | 1 << 7), 0);
    assert_eq!(read(0xa, 0), [0; 4]);
}
