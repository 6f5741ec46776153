//! vCPUs of KVM, bare: state in and out, exits, kicks, time, and the software CPU's help.
//!
//! Where there is no KVM, there is nothing to test, and each test says so.

mod board;

use std::time::{Duration, Instant};

use caisson_hypervisor::{
    Completion, Exit, Pending, Space, Vcpu,
    x86::{RunState, VcpuState},
};
use caisson_hypervisor_soft::Soft;
use caisson_memory::{Gpa, Vtl};

use board::{CODE, END, Log, board, board_of, run};

#[test]
fn power_on_is_what_the_manual_says() {
    let Some(board) = board() else { return };
    let vcpu = board.partition.create_vcpu(0).unwrap();
    let state = vcpu.state(Vtl::VTL0).unwrap();
    let expected = VcpuState::at_power_on(0, true, board.partition.cpuid().get(1, 0)[0]);
    assert_eq!(state.gprs, expected.gprs);
    assert_eq!(state.segments, expected.segments);
    assert_eq!((state.cr0, state.cr4, state.efer), (expected.cr0, 0, 0));
    assert_eq!(state.debug, expected.debug);
    assert_eq!(state.run_state, RunState::Running);
    assert_eq!(state.apic.base, expected.apic.base);
    assert_eq!(state.xsave.xcr0, 1);
    assert!(board.partition.create_vcpu(0).is_err(), "it exists");
    assert!(board.partition.create_vcpu(1).is_err(), "there is none");
}

#[test]
fn state_comes_back_as_it_was_set() {
    let Some(board) = board() else { return };
    board.partition.set_clock_running(false);
    let mut vcpu = board.partition.create_vcpu(0).unwrap();
    let mut state = board.long_mode(&*vcpu, &END);
    for (n, register) in state.gprs.regs.iter_mut().enumerate() {
        *register = 0x1111_1111_1111_1111 * n as u64;
    }
    state.cr2 = 0xdead_beef_0000;
    state.cr8 = 5;
    // The task priority, and the processor priority that follows from it.
    state.apic.regs[8] = 0x50;
    state.apic.regs[10] = 0x50;
    state.debug.address = [1, 2, 3, 4].map(|n| n << 32);
    state.debug.dr7 = 0x455;
    for byte in &mut state.xsave.area[160..416] {
        *byte = 0xa5;
    }
    state.xsave.area[512] = 3;
    state.events.nmi_pending = true;
    state.events.sti_shadow = true;
    for entry in &mut state.msrs {
        match entry.index {
            0xc000_0081 => entry.value = 0x0023_0010_0000_0000,
            0xc000_0082 => entry.value = 0xffff_8000_1234_5678,
            0x10 => entry.value = 0x1234_5678_9abc,
            _ => {}
        }
    }
    vcpu.set_state(Vtl::VTL0, &state).unwrap();
    assert_eq!(vcpu.state(Vtl::VTL0).unwrap(), state);
}

#[test]
fn impossible_state_is_refused_and_changes_nothing() {
    let Some(board) = board() else { return };
    board.partition.set_clock_running(false);
    let mut vcpu = board.vcpu(&END);
    let before = vcpu.state(Vtl::VTL0).unwrap();
    let refused: [fn(&mut VcpuState); 4] = [
        |s| s.apic.regs.truncate(7),
        |s| s.cr4 = u64::MAX,
        |s| s.xsave.xcr0 = 1 << 62,
        |s| {
            s.msrs.push(caisson_hypervisor::x86::MsrEntry {
                index: 0x1234_5678,
                value: 1,
            });
        },
    ];
    for change in refused {
        let mut state = before.clone();
        change(&mut state);
        let refusal = vcpu.set_state(Vtl::VTL0, &state).unwrap_err();
        assert!(!refusal.to_string().is_empty());
        assert_eq!(vcpu.state(Vtl::VTL0).unwrap(), before, "{refusal}");
    }
}

#[test]
fn ports_memory_and_repeats_reach_the_bus() {
    let Some(board) = board() else { return };
    board.memory.write(Gpa(0x9000), b"abcdef").unwrap();
    let code = [
        // mov dx, 0x1234; mov eax, 0x11223344; out dx, eax; in ax, dx; mov bx, ax
        &[0x66u8, 0xba, 0x34, 0x12, 0xb8, 0x44, 0x33, 0x22, 0x11, 0xef][..],
        &[0x66, 0xed, 0x66, 0x89, 0xc3],
        // mov esi, 0x9000; mov ecx, 3; cld; rep outsw
        &[
            0xbe, 0, 0x90, 0, 0, 0xb9, 3, 0, 0, 0, 0xfc, 0xf3, 0x66, 0x6f,
        ],
        &END,
    ]
    .concat();
    let mut vcpu = board.vcpu(&code);
    let log = Log::default();
    run(&mut *vcpu, &log);
    let pio = |data: &[u8]| (Space::Pio, 0x1234, data.to_vec());
    assert_eq!(
        *log.writes.lock().unwrap(),
        [
            pio(&[0x44, 0x33, 0x22, 0x11]),
            pio(b"ab"),
            pio(b"cd"),
            pio(b"ef")
        ]
    );
    assert_eq!(vcpu.state(Vtl::VTL0).unwrap().gprs.regs[3], 0x3534);
    assert!(vcpu.stats().pio >= 3);
}

#[test]
fn a_parked_access_is_completed_later() {
    let Some(board) = board() else { return };
    // in al, 0x60; mov bl, al; in al, 0x61; mov bh, al
    let code = [
        &[0xe4u8, 0x60, 0x88, 0xc3, 0xe4, 0x61, 0x88, 0xc7][..],
        &END,
    ]
    .concat();
    let mut vcpu = board.vcpu(&code);
    let log = Log::default();
    *log.park.lock().unwrap() = vec![0x60];
    let pending = Exit::Pending(Pending::Read {
        space: Space::Pio,
        address: Gpa(0x60),
        len: 1,
    });
    assert_eq!(vcpu.run(&log), pending);
    vcpu.complete(Completion::Retry).unwrap();
    assert_eq!(vcpu.run(&log), pending, "the bus is asked again");
    assert!(
        vcpu.state(Vtl::VTL0).is_err(),
        "half of it is in the kernel"
    );
    vcpu.complete(Completion::Value(vec![0x99])).unwrap();
    run(&mut *vcpu, &log);
    assert_eq!(vcpu.state(Vtl::VTL0).unwrap().gprs.regs[3], 0x6199);
}

#[test]
fn a_kick_ends_an_endless_loop() {
    let Some(board) = board() else { return };
    let mut vcpu = board.vcpu(&[0xeb, 0xfe]);
    let kick = vcpu.kick_handle();
    kick.kick();
    assert_eq!(vcpu.run(&Log::default()), Exit::Kicked, "kicked before");
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            kick.kick();
        });
        assert_eq!(vcpu.run(&Log::default()), Exit::Kicked);
    });
    assert!(started.elapsed() >= Duration::from_millis(50));
    assert_eq!(vcpu.state(Vtl::VTL0).unwrap().gprs.rip, CODE);
}

#[test]
fn time_stands_still_while_the_clock_does() {
    let Some(board) = board() else { return };
    let mut vcpu = board.vcpu(&END);
    let tsc = |vcpu: &dyn Vcpu| {
        let state = vcpu.state(Vtl::VTL0).unwrap();
        state.msrs.iter().find(|e| e.index == 0x10).unwrap().value
    };
    let running = tsc(&*vcpu);
    assert!(tsc(&*vcpu) > running);
    board.partition.set_clock_running(false);
    let (held, now) = (tsc(&*vcpu), board.partition.now_ns());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(tsc(&*vcpu), held);
    assert_eq!(board.partition.now_ns(), now);
    let mut state = vcpu.state(Vtl::VTL0).unwrap();
    for entry in &mut state.msrs {
        if entry.index == 0x10 {
            entry.value = 1 << 50;
        }
    }
    vcpu.set_state(Vtl::VTL0, &state).unwrap();
    board.partition.set_clock_running(true);
    let went_on = tsc(&*vcpu);
    if went_on < 1 << 50 {
        println!("not tested: this host's KVM cannot move the TSC");
        return;
    }
    let range = 1 << 50..(1 << 50) + board.partition.tsc_hz();
    assert!(
        range.contains(&went_on),
        "{went_on:#x} is not in {range:x?}"
    );
}

#[test]
fn a_vcpu_moves_between_kvm_and_the_software_cpu_in_the_middle() {
    let Some(kvm) = board() else { return };
    let soft = board_of(&Soft::default(), 1);
    // A sum over a loop, with a port write in each round: mov ecx, 40; xor ebx, ebx;
    // l: imul rbx, rbx, 31; add rbx, rcx; out 0x80, al; dec ecx; jnz l
    let code = [
        &[0xb9u8, 40, 0, 0, 0, 0x31, 0xdb][..],
        &[0x48, 0x6b, 0xdb, 31, 0x48, 0x01, 0xcb, 0xe6, 0x80],
        &[0xff, 0xc9, 0x75, 0xf3],
        &END,
    ]
    .concat();
    let expected = (1..=40u64)
        .rev()
        .fold(0u64, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
    let mut here = kvm.vcpu(&code);
    let mut there = soft.partition.create_vcpu(0).unwrap();
    // The two boards have memory of their own.
    let _ = soft.long_mode(&*there, &code);
    let log = Log::default();
    *log.park.lock().unwrap() = vec![0x80, 0xf4];
    let mut moves = 0;
    loop {
        let exit = here.run(&log);
        let Exit::Pending(Pending::Write { address, .. }) = exit else {
            panic!("move {moves}: {exit:?} {:x?}", here.state(Vtl::VTL0));
        };
        if address == Gpa(0xf4) {
            break;
        }
        here.complete(Completion::Value(vec![])).unwrap();
        // To where nothing is pending: KVM retires the instruction, the software CPU starts it again.
        here.kick_handle().kick();
        assert_eq!(here.run(&log), Exit::Kicked);
        let state = here.state(Vtl::VTL0).unwrap();
        let mut usable = state.clone();
        // Each backend has MSRs that the other does not know.
        let known = there.state(Vtl::VTL0).unwrap().msrs;
        usable
            .msrs
            .retain(|e| known.iter().any(|k| k.index == e.index));
        there.set_state(Vtl::VTL0, &usable).unwrap();
        let arrived = there.state(Vtl::VTL0).unwrap();
        assert_eq!(arrived.gprs, state.gprs);
        assert_eq!(arrived.segments, state.segments);
        let differ: Vec<_> = (0..state.xsave.area.len())
            // XSTATE_BV may say of more components that they are in use.
            .filter(|at| !(512..520).contains(at))
            .filter(|at| arrived.xsave.area.get(*at) != state.xsave.area.get(*at))
            .map(|at| (at, arrived.xsave.area.get(at), state.xsave.area[at]))
            .collect();
        assert!(differ.is_empty(), "vector areas, move {moves}: {differ:x?}");
        assert_eq!(arrived.apic.base, state.apic.base);
        assert_eq!(
            (arrived.cr0, arrived.cr3, arrived.cr4, arrived.efer),
            (state.cr0, state.cr3, state.cr4, state.efer)
        );
        std::mem::swap(&mut here, &mut there);
        moves += 1;
    }
    assert!(moves >= 40, "{moves}");
    here.complete(Completion::Abandoned).unwrap();
    assert_eq!(here.state(Vtl::VTL0).unwrap().gprs.regs[3], expected);
}

#[test]
fn what_kvm_gives_up_on_is_executed_all_the_same() {
    let Some(board) = board() else { return };
    board
        .memory
        .write(
            Gpa(0x9000),
            &[1u64.to_le_bytes(), 2u64.to_le_bytes()].concat(),
        )
        .unwrap();
    // A vector store to device memory: movups [0xfed00000], xmm0 is beyond KVM's
    // emulator on any host; and cmpxchg16b beyond that of kvm_pvm.
    let code = [
        // mov eax, 1; mov edx, 2; mov ebx, 3; mov ecx, 4
        &[
            0xb8u8, 1, 0, 0, 0, 0xba, 2, 0, 0, 0, 0xbb, 3, 0, 0, 0, 0xb9, 4, 0, 0, 0,
        ][..],
        // mov edi, 0x9000; lock cmpxchg16b [rdi]
        &[0xbf, 0, 0x90, 0, 0, 0xf0, 0x48, 0x0f, 0xc7, 0x0f],
        &END,
    ]
    .concat();
    let mut vcpu = board.vcpu(&code);
    run(&mut *vcpu, &Log::default());
    let mut cell = [0; 16];
    board.memory.read(Gpa(0x9000), &mut cell).unwrap();
    assert_eq!(cell, *[3u64.to_le_bytes(), 4u64.to_le_bytes()].concat());
    println!(
        "{} instructions were helped out with",
        vcpu.stats().emulated
    );
}
