//! Network cards, as flags and files say them.

use caisson_config::{Limits, MachineConfig, Memory, Net, NetKind};

const LIMITS: Limits = Limits {
    max_cpus: 4,
    host_memory: None,
};

#[test]
fn what_can_be_there_several_times_is_a_list() {
    let net: Net = "user,deny=*,forward=tcp:1:2,allow=a.test:443,forward=udp:3:4,host-access"
        .parse()
        .unwrap();
    assert_eq!(net.kind, NetKind::User);
    assert_eq!(net.forward, ["tcp:1:2", "udp:3:4"]);
    assert_eq!(
        (net.allow, net.deny),
        (vec!["a.test:443".to_owned()], vec!["*".to_owned()])
    );
    assert!(net.host_access);
    let toml = r#"net = ["user,forward=tcp:1:2", { forward = ["tcp:1:2", "udp:3:4"] }, { deny = "*" }, "none"]"#;
    let config = MachineConfig::from_toml(toml).unwrap();
    let forwards: Vec<usize> = config.net.iter().map(|net| net.forward.len()).collect();
    assert_eq!(forwards, [1, 2, 0, 0]);
    assert_eq!(config.cards().count(), 3);
    assert_eq!(
        MachineConfig::from_toml(&config.to_toml().unwrap()).unwrap(),
        config
    );
}

#[test]
fn what_cannot_is_said_twice_in_vain() {
    for text in [
        "user,mtu=1500,mtu=1500",
        "user,kind=none",
        "user,host-access,host-access=on",
        "user,dns=1.1.1.1,dns=1.1.1.1",
    ] {
        let message = text.parse::<Net>().unwrap_err().to_string();
        assert!(message.ends_with("is given twice"), "{text}: {message}");
    }
    let twice = "1G,hugepages=on,hugepages=off".parse::<Memory>();
    assert!(twice.unwrap_err().to_string().ends_with("is given twice"));
}

#[test]
fn impossible_networks_are_refused() {
    for (net, what) in [
        ("\"user,mtu=1000\"", "1280 to 65521"),
        ("\"user\",\"user\",\"user\",\"user\",\"user\"", "at most 4"),
    ] {
        let config = MachineConfig::from_toml(&format!("net = [{net}]")).unwrap();
        let message = config.validate(&LIMITS).unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    }
    assert!(
        "usr"
            .parse::<Net>()
            .unwrap_err()
            .to_string()
            .contains("user")
    );
}
