//! The user-mode network as Debian's own driver and tools use it, against servers on the host's loopback.

use std::{
    io::{Read, Write},
    net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, mpsc},
    thread,
};

use caisson_config::VirtioTransport;
use caisson_hypervisor::Hypervisor;
use caisson_machine::Outcome;
use caisson_tests::{
    debian::{BOOT, virtio_spec},
    vm::{Moves, NetDescription, Vm, backends},
};

/// The end of the shell's prompt.
const PROMPT: &str = "# ";
/// How much is moved each way.
const BYTES: usize = 2 << 20;

/// A name server on the host's loopback that says 10.0.2.2 for every name.
fn name_server() -> SocketAddrV4 {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let address = socket.local_addr().expect("an address");
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut query) {
            let mut answer = query[..len].to_vec();
            answer[2] |= 0x80;
            // An address where one is asked for; for other types there is none.
            if answer[len - 4..] == [0, 1, 0, 1] {
                answer[7] = 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 0, 2, 2]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    match address {
        std::net::SocketAddr::V4(address) => address,
        std::net::SocketAddr::V6(_) => unreachable!("it was bound to IPv4"),
    }
}

/// Bytes that do not repeat soon.
fn pattern() -> Vec<u8> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(BYTES).collect()
}

/// A web server on the host's loopback: gives `pattern()` for GET, and tells what was sent to it with POST.
fn web_server() -> (u16, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let port = listener.local_addr().expect("an address").port();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let tell = tell.clone();
            thread::spawn(move || serve(stream, &tell));
        }
    });
    (port, told)
}

fn serve(mut stream: TcpStream, tell: &mpsc::Sender<Vec<u8>>) -> Option<()> {
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    let body = loop {
        let len = stream.read(&mut piece).ok().filter(|len| *len > 0)?;
        request.extend_from_slice(&piece[..len]);
        if let Some(end) = request.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&request[..body]).into_owned();
    let mut answer = pattern();
    if let Some((_, rest)) = head.split_once("Content-Length: ") {
        let len: usize = rest.lines().next()?.trim().parse().ok()?;
        let mut sent = request.split_off(body);
        while sent.len() < len {
            let len = stream.read(&mut piece).ok().filter(|len| *len > 0)?;
            sent.extend_from_slice(&piece[..len]);
        }
        tell.send(sent).ok()?;
        answer.clear();
    }
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        answer.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(&answer).ok()
}

/// A port of the host's that is free now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    listener.local_addr().expect("an address").port()
}

struct Guest {
    vm: Vm,
    at: usize,
}

impl Guest {
    /// Runs `line` at the shell and gives what it printed.
    fn run(&mut self, line: &str) -> String {
        // The line itself is echoed, with its arithmetic not done.
        let line = format!("echo begin-$((40 + 2)); {line}; echo end-$((40 + 2))\n");
        self.vm.type_text(&line).unwrap();
        let com1 = &self.vm.com1;
        let answers = "the shell answers";
        let from = com1.wait_for("begin-42\r\n", self.at, BOOT).expect(answers);
        self.at = com1.wait_for("end-42\r\n", from, BOOT).expect(answers);
        let text = com1.text();
        let printed = text.get(from..self.at).unwrap_or_default();
        printed
            .replace('\r', "")
            .trim_end_matches("end-42\n")
            .trim()
            .into()
    }
}

fn boot(backend: &Arc<dyn Hypervisor>, forwards: Vec<String>) -> Guest {
    let modules = ["virtio_pci", "virtio_net", "virtio_rng", "virtio_console"];
    let mut spec = virtio_spec(backend, VirtioTransport::Pci, &modules).expect("there is an image");
    // A connection does not outlive a move.
    spec.moves = Moves::After(Vec::new());
    spec.net = Some(NetDescription {
        forwards,
        resolver: Some(name_server()),
    });
    let vm = Vm::start(&spec).expect("the machine starts");
    let at = vm.com1.wait_for(PROMPT, 0, BOOT).expect("a prompt");
    let mut guest = Guest { vm, at };
    // What the kernel says from now on is for dmesg, not among answers.
    guest.run("dmesg -n 1");
    guest
}

fn power_off(mut guest: Guest) {
    assert_eq!(
        guest.run("dmesg | grep -i 'virtio_net\\|eth0' | grep -iE 'bug|warn|fail|error|timed out'"),
        ""
    );
    let shown = guest.vm.inspect().unwrap();
    assert!(!shown.contains("needs reset because"), "{shown}");
    guest.vm.type_text("poweroff -f\n").unwrap();
    assert_eq!(
        guest.vm.wait(BOOT).expect("it powers off"),
        Outcome::PowerOff
    );
}

#[test]
fn debian_is_on_the_network_when_its_shell_starts() {
    let (port, told) = web_server();
    for backend in backends() {
        let inward = free_port();
        let mut guest = boot(&backend, vec![format!("tcp:{inward}:8080")]);
        let address = guest.run("ip -4 -o addr show eth0 | grep -o 'inet [0-9./]*'");
        assert_eq!(address, "inet 10.0.2.15/24");
        assert_eq!(guest.run("cat /etc/resolv.conf"), "nameserver 10.0.2.3");
        let echo = guest.run("ping -c 2 10.0.2.2 | grep -c 'bytes from'");
        assert_eq!(echo, "2");
        let name = guest.run("nslookup -type=a example.test | tail -2");
        assert!(name.contains("10.0.2.2"), "{name}");

        // To the host and back, the whole of it.
        guest.run(&format!("wget -q -O /tmp/got http://example.test:{port}/"));
        let got = guest.run("sha256sum < /tmp/got; wc -c < /tmp/got");
        guest.run(&format!(
            "(printf 'POST / HTTP/1.0\\r\\nContent-Length: {BYTES}\\r\\n\\r\\n'; cat /tmp/got) \
             | nc 10.0.2.2 {port} > /dev/null"
        ));
        assert!(told.recv().expect("it was sent") == pattern());
        assert!(got.ends_with(&BYTES.to_string()), "{got}");
        let refused = guest.run(&format!(
            "nc -w 5 10.0.2.2 {} < /dev/null; echo $?",
            free_port()
        ));
        assert!(refused.ends_with('1'), "{refused}");

        // From the host into the guest.
        guest.run("(nc -l -p 8080 -e sh -c 'read line; echo heard $line; cat /tmp/got') & while ! netstat -tln | grep -q ':8080 '; do sleep 0.1; done");
        let mut stream = TcpStream::connect(("127.0.0.1", inward)).expect("it is forwarded");
        stream.write_all(b"hello\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let body = answer.strip_prefix(b"heard hello\n").expect("an answer");
        assert!(body == pattern());
        power_off(guest);
    }
}

#[test]
fn connections_end_when_the_machine_goes_elsewhere_and_new_ones_are_made() {
    let (port, _told) = web_server();
    // It accepts, and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let mute = silent.local_addr().expect("an address").port();
    let _held = thread::spawn(move || silent.incoming().flatten().collect::<Vec<_>>());
    for backend in backends() {
        let mut guest = boot(&backend, Vec::new());
        // One waits for what never comes: it must be told.
        guest.run(&format!(
            "(nc 10.0.2.2 {mute} < /dev/zero > /dev/null; echo $? > /tmp/speaker) & \
             (sleep 1000 | nc 10.0.2.2 {mute}; echo $? > /tmp/listener) & \
             while [ $(netstat -tn | grep -c ESTABLISHED) -lt 2 ]; do sleep 0.1; done"
        ));
        guest.vm.change_process().expect("the machine moves");
        guest.run("while netstat -tn | grep -q ESTABLISHED; do sleep 0.1; done");
        guest.run(&format!("wget -q -O /tmp/got http://example.test:{port}/"));
        assert_eq!(guest.run("wc -c < /tmp/got"), BYTES.to_string());
        guest.run("killall sleep");
        power_off(guest);
    }
}
