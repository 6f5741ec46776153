//! Guest memory on KVM: what is noted of writes to it, ROM, and guest_memfd.
//!
//! Where there is no KVM, there is nothing to test, and each test says so.

mod board;

use std::sync::Arc;

use caisson_hypervisor::{DirtyMethod, HypervisorError, PartitionConfig, Space, Vcpu};
use caisson_hypervisor_kvm::Kvm;
use caisson_memory::{
    DirtyBitmap, Gpa, GuestMemory, PAGE_SIZE, RegionKind, Vtl,
    host::{HugePages, Mapping},
};

use board::{Board, END, Log, RAM, board_of, board_with, has_kvm, run};

const RING: DirtyMethod = DirtyMethod::Ring { entries: 1024 };
/// Two more pieces of memory, in the guest's reach.
const HIGH: u64 = 0x40_0000;
const HIGH_LEN: u64 = 0x40_0000;
const PAGES: u64 = HIGH_LEN / PAGE_SIZE;

struct Watched {
    board: Board,
    vcpu: Box<dyn Vcpu>,
    low: Arc<DirtyBitmap>,
    high: Arc<DirtyBitmap>,
}

impl Watched {
    fn new(dirty: DirtyMethod) -> Self {
        let mapping = Mapping::new("test", RAM + HIGH_LEN, HugePages::Off).unwrap();
        let low = Arc::new(DirtyBitmap::new(RAM / PAGE_SIZE));
        let high = Arc::new(DirtyBitmap::new(PAGES));
        let regions = vec![
            mapping
                .region("low", Gpa(0), 0, RAM, RegionKind::Ram)
                .with_dirty(low.clone()),
            mapping
                .region("high", Gpa(HIGH), RAM, HIGH_LEN, RegionKind::Ram)
                .with_dirty(high.clone()),
        ];
        let config = PartitionConfig {
            dirty,
            ..PartitionConfig::new(1, GuestMemory::new(regions).unwrap())
        };
        let board = board_with(&Kvm, config);
        let vcpu = board.vcpu(&END);
        Self {
            board,
            vcpu,
            low,
            high,
        }
    }

    fn log(&self) -> &dyn caisson_hypervisor::DirtyLog {
        self.board.partition.power().dirty_log.unwrap()
    }

    /// Runs `code` from its beginning to its end.
    fn run(&mut self, code: &[u8]) {
        let mut state = self.board.long_mode(&*self.vcpu, code);
        // Vectors are not used, and whether they are is noted too late.
        state.xsave = self.vcpu.state(Vtl::VTL0).unwrap().xsave;
        self.vcpu.set_state(Vtl::VTL0, &state).unwrap();
        // What the board itself wrote.
        let _ = (self.low.harvest(), self.high.harvest());
        run(&mut *self.vcpu, &Log::default());
    }

    fn harvest(&self) -> (Vec<u64>, Vec<u64>) {
        self.log().sync(&self.low);
        self.log().sync(&self.high);
        (pages(&self.low), pages(&self.high))
    }
}

fn pages(bitmap: &DirtyBitmap) -> Vec<u64> {
    let words = bitmap.harvest();
    (0u64..)
        .zip(words)
        .flat_map(|(at, word)| (0..64).map(move |bit| (at * 64 + bit, word >> bit & 1)))
        .filter_map(|(page, dirty)| (dirty != 0).then_some(page))
        .collect()
}

/// mov byte [address], 1 for each; the end.
fn touch(addresses: &[u64]) -> Vec<u8> {
    let mut code = Vec::new();
    for &address in addresses {
        code.extend([0xc6, 0x04, 0x25]);
        code.extend((address as u32).to_le_bytes());
        code.push(1);
    }
    code.extend(END);
    code
}

/// Writes to `count` pages from `HIGH` on: mov edi, HIGH; mov ecx, count;
/// l: mov [rdi], cl; add rdi, 4096; dec ecx; jnz l
fn sweep(count: u64) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend((HIGH as u32).to_le_bytes());
    code.push(0xb9);
    code.extend((count as u32).to_le_bytes());
    code.extend([0x88, 0x0f, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0]);
    code.extend([0xff, 0xc9, 0x75, 0xf3]);
    code.extend(END);
    code
}

#[test]
fn the_pages_that_were_written_are_dirty_and_no_others() {
    if !has_kvm() {
        return;
    }
    for method in [DirtyMethod::Bitmap, RING] {
        let mut watched = Watched::new(method);
        println!("{method:?}: {:?}", watched.log().method());
        assert_eq!(watched.harvest().1.len() as u64, PAGES, "off: who knows");
        watched.log().set_enabled(true).unwrap();
        let code = touch(&[
            0x2_0123,
            0x1f_ffff,
            HIGH,
            HIGH + 0x1000,
            HIGH + HIGH_LEN - 1,
        ]);
        watched.run(&code);
        // The processor notes in the page tables what it used of them.
        let beyond_tables = |(low, high): (Vec<u64>, Vec<u64>)| {
            let low: Vec<_> = low.into_iter().filter(|page| *page > 3).collect();
            (low, high)
        };
        let expected = (vec![0x20, 0x1ff], vec![0, 1, PAGES - 1]);
        assert_eq!(beyond_tables(watched.harvest()), expected, "{method:?}");
        assert_eq!(beyond_tables(watched.harvest()), (vec![], vec![]), "again");
        // Watched again after the harvest.
        watched.run(&touch(&[HIGH + 0x1fff]));
        assert_eq!(beyond_tables(watched.harvest()), (vec![], vec![1]));
        watched.log().set_enabled(false).unwrap();
        watched.run(&touch(&[HIGH]));
        watched.log().set_enabled(true).unwrap();
        assert_eq!(
            beyond_tables(watched.harvest()),
            (vec![], vec![]),
            "was off"
        );
        watched.run(&touch(&[HIGH + 0x3000]));
        assert_eq!(beyond_tables(watched.harvest()), (vec![], vec![3]));
    }
}

#[test]
fn a_full_list_is_emptied_while_the_guest_runs() {
    if !has_kvm() {
        return;
    }
    let mut watched = Watched::new(RING);
    if watched.log().method() != RING {
        println!("not tested: this host's KVM has no dirty rings that could be trusted");
        return;
    }
    watched.log().set_enabled(true).unwrap();
    for _ in 0..3 {
        watched.run(&sweep(PAGES));
        // More came than a list holds, so some of it was emptied already.
        let taken_inside = pages(&watched.high);
        assert!(!taken_inside.is_empty());
        let mut all = watched.harvest().1;
        all.extend(taken_inside);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all, (0..PAGES).collect::<Vec<_>>());
    }
}

#[test]
fn a_running_vcpu_is_harvested_too() {
    if !has_kvm() {
        return;
    }
    for method in [DirtyMethod::Bitmap, RING] {
        let mut watched = Watched::new(method);
        watched.log().set_enabled(true).unwrap();
        // l: mov byte [HIGH + 0x5000], 1; jmp l
        let mut code = touch(&[HIGH + 0x5000]);
        code.truncate(8);
        code.extend([0xeb, 0xf6]);
        let state = watched.board.long_mode(&*watched.vcpu, &code);
        watched.vcpu.set_state(Vtl::VTL0, &state).unwrap();
        let Watched {
            board,
            vcpu,
            low,
            high,
        } = &mut watched;
        let log = board.partition.power().dirty_log.unwrap();
        let _ = (low.harvest(), high.harvest());
        board::while_running(&mut **vcpu, &Log::default(), || {
            for _ in 0..5 {
                let started = std::time::Instant::now();
                loop {
                    log.sync(high);
                    if high.is_dirty(5) {
                        break;
                    }
                    assert!(started.elapsed().as_secs() < 20, "{method:?}");
                    // Each harvest has the vCPU leave the guest: let it get on.
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                assert_eq!(pages(high), [5]);
            }
        });
    }
}

#[test]
fn what_the_software_cpu_helps_with_is_noted_too() {
    if !has_kvm() {
        return;
    }
    for method in [DirtyMethod::Bitmap, RING] {
        let mut watched = Watched::new(method);
        watched.log().set_enabled(true).unwrap();
        // mov edi, HIGH + 0x9000; lock cmpxchg16b [rdi]: beyond kvm_pvm's emulator.
        let code = [
            &[0xbfu8, 0, 0x90, 0x40, 0, 0xf0, 0x48, 0x0f, 0xc7, 0x0f][..],
            &END,
        ]
        .concat();
        for round in 0..3 {
            watched.run(&code);
            assert_eq!(watched.harvest().1, [9], "{method:?}, round {round}");
        }
        println!(
            "{} instructions were helped with",
            watched.vcpu.stats().emulated
        );
    }
}

#[test]
fn lists_of_impossible_lengths_are_refused() {
    if !has_kvm() {
        return;
    }
    for entries in [0, 1, 512, 1000, 1025, 131_072, u32::MAX] {
        let config = PartitionConfig {
            dirty: DirtyMethod::Ring { entries },
            ..PartitionConfig::new(1, board::ram(RAM))
        };
        let refusal = caisson_hypervisor::Hypervisor::create_partition(&Kvm, config).err();
        let refusal = refusal.unwrap().to_string();
        assert!(refusal.contains(&format!("not {entries}")), "{refusal}");
    }
}

#[test]
fn what_was_written_survives_a_new_memory_table() {
    if !has_kvm() {
        return;
    }
    for method in [DirtyMethod::Bitmap, RING] {
        let mut watched = Watched::new(method);
        watched.log().set_enabled(true).unwrap();
        watched.run(&touch(&[HIGH + 0x7000]));
        // "high" is taken away, and something else gets its memslot.
        let other = Mapping::new("other", RAM, HugePages::Off).unwrap();
        let memory = watched.board.memory.memory();
        let regions = vec![
            memory.regions()[0].clone(),
            other.region("other", Gpa(0x20_0000), 0, RAM, RegionKind::Ram),
        ];
        let table = GuestMemory::new(regions).unwrap();
        watched
            .board
            .partition
            .set_memory(Vtl::VTL0, table)
            .unwrap();
        assert_eq!(pages(&watched.high), [7], "{method:?}");
    }
}

#[test]
fn rom_is_read_and_executed_and_its_writes_go_to_the_bus() {
    if !has_kvm() {
        return;
    }
    let rom = Mapping::new("rom", 0x2000, HugePages::Off).unwrap();
    let filled = rom.region("filled", Gpa(0), 0, 0x2000, RegionKind::Ram);
    let board = board_of(&Kvm, 1);
    let contents: Vec<u8> = (0..0x2000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    let filled = caisson_memory::MemoryView::new(GuestMemory::new(vec![filled]).unwrap());
    filled.write(Gpa(0), &contents).unwrap();
    // mov bh, 0x77; ret
    filled.write(Gpa(0x1800), &[0xb7, 0x77, 0xc3]).unwrap();
    let mut regions = board.memory.memory().regions().to_vec();
    regions.push(rom.region("rom", Gpa(HIGH), 0, 0x2000, RegionKind::Rom));
    let table = GuestMemory::new(regions).unwrap();
    board.partition.set_memory(Vtl::VTL0, table).unwrap();

    let code = [
        // mov edi, HIGH; mov ecx, [rdi + 0x123]
        &[0xbfu8, 0, 0, 0x40, 0, 0x8b, 0x8f, 0x23, 0x01, 0, 0][..],
        // lea rax, [rdi + 0x1800]; call rax
        &[0x48, 0x8d, 0x87, 0, 0x18, 0, 0, 0xff, 0xd0],
        // mov dword [rdi + 0x123], 0x44332211; mov byte [rdi + 0x1fff], 0x55
        &[0xc7, 0x87, 0x23, 0x01, 0, 0, 0x11, 0x22, 0x33, 0x44],
        &[0xc6, 0x87, 0xff, 0x1f, 0, 0, 0x55],
        // mov edx, [rdi + 0x123]
        &[0x8b, 0x97, 0x23, 0x01, 0, 0],
        &END,
    ]
    .concat();
    let mut vcpu = board.vcpu(&code);
    let log = Log::default();
    run(&mut *vcpu, &log);
    let to = |offset, data: &[u8]| (Space::Mmio, HIGH + offset, data.to_vec());
    assert_eq!(
        *log.writes.lock().unwrap(),
        [to(0x123, &[0x11, 0x22, 0x33, 0x44]), to(0x1fff, &[0x55])]
    );
    let word = u32::from_le_bytes(contents[0x123..0x127].try_into().unwrap());
    let regs = vcpu.state(Vtl::VTL0).unwrap().gprs.regs;
    assert_eq!((regs[1], regs[2]), (word.into(), word.into()), "unchanged");
    assert_eq!(regs[3] & 0xff00, 0x7700, "its code ran");
    assert_eq!(filled.read_obj::<u32>(Gpa(0x123)).unwrap(), word);
}

#[test]
fn guest_memfd_is_memory_where_the_host_has_it() {
    if !has_kvm() {
        return;
    }
    let board = board_of(&Kvm, 1);
    let power = board.partition.power();
    let Some(backend) = power.backend_memory else {
        panic!("KVM says why it has none, if it has none");
    };
    for len in [0, 1, PAGE_SIZE + 1] {
        assert!(backend.ram("odd", Gpa(HIGH), len).is_err(), "{len}");
    }
    let region = match backend.ram("own", Gpa(HIGH), HIGH_LEN) {
        Ok(region) => region,
        Err(refusal) => {
            let refusal = refusal.to_string();
            assert!(refusal.contains("Linux"), "{refusal}");
            println!("not tested: {refusal}");
            return;
        }
    };
    assert_eq!((region.gpa(), region.len()), (Gpa(HIGH), HIGH_LEN));
    let mut regions = board.memory.memory().regions().to_vec();
    regions.push(region);
    let table = GuestMemory::new(regions.clone()).unwrap();
    let view = caisson_memory::MemoryView::new(table.clone());
    view.write_obj(Gpa(HIGH + 0x1000), &0x1234_5678u32).unwrap();
    board.partition.set_memory(Vtl::VTL0, table).unwrap();
    let code = [
        // mov ebx, [HIGH + 0x1000]; mov [HIGH + 0x2000], ebx
        &[0x8bu8, 0x1c, 0x25, 0, 0x10, 0x40, 0][..],
        &[0x89, 0x1c, 0x25, 0, 0x20, 0x40, 0],
        &END,
    ]
    .concat();
    let mut vcpu = board.vcpu(&code);
    run(&mut *vcpu, &Log::default());
    assert_eq!(
        view.read_obj::<u32>(Gpa(HIGH + 0x2000)).unwrap(),
        0x1234_5678
    );
    assert_eq!(vcpu.state(Vtl::VTL0).unwrap().gprs.regs[3], 0x1234_5678);

    // Its writes cannot be watched, and then nothing is.
    let log = power.dirty_log.unwrap();
    let refusal = log.set_enabled(true).unwrap_err();
    assert!(matches!(refusal, HypervisorError::Host { .. }), "{refusal}");
    regions.pop();
    let table = GuestMemory::new(regions).unwrap();
    board.partition.set_memory(Vtl::VTL0, table).unwrap();
    log.set_enabled(true).unwrap();

    // It is this partition's alone.
    let stranger = board_of(&Kvm, 1);
    let memory = view.memory().clone();
    let refusal = stranger.partition.set_memory(Vtl::VTL0, memory).err();
    assert!(refusal.unwrap().to_string().contains("own"), "whose it is");
}
