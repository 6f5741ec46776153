//! Checksums and addresses.

use caisson_packet::{MacAddress, Sum, complete};

#[test]
fn sums_are_those_of_rfc_1071() {
    // The example of its section 3.
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(Sum::default().bytes(&bytes).fold(), 0xddf2);
    assert_eq!(Sum::default().bytes(&bytes).finish(), 0x220d);
    for len in 0..64usize {
        let bytes: Vec<u8> = (0..len).map(|n| (n * 37 + 200) as u8).collect();
        let mut slow = 0u32;
        for pair in bytes.chunks(2) {
            slow += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            slow = (slow & 0xffff) + (slow >> 16);
        }
        assert_eq!(
            u32::from(Sum::default().bytes(&bytes).fold()),
            slow,
            "{len}"
        );
    }
}

#[test]
fn an_open_checksum_is_completed_where_it_lies_within() {
    let mut bytes = [1, 2, 3, 4, 0, 7, 9, 9];
    assert!(complete(&mut bytes, 2, 2));
    // What was in the field stood for the pseudo-header.
    assert_eq!(Sum::default().bytes(&bytes[2..]).word(7).fold(), 0xffff);
    let before = bytes;
    for (start, offset) in [(9, 0), (8, 0), (2, 5), (0xffff, 0xffff), (2, 0xffff)] {
        assert!(!complete(&mut bytes, start, offset));
    }
    assert_eq!(bytes, before);
}

#[test]
fn addresses_are_read_as_they_are_written() {
    let address: MacAddress = "02:0a:ff:00:9c:01".parse().unwrap();
    assert_eq!(address.0, [2, 10, 255, 0, 0x9c, 1]);
    assert_eq!(address.to_string(), "02:0a:ff:00:9c:01");
    for wrong in [
        "",
        "02:0a:ff:00:9c",
        "02:0a:ff:00:9c:01:02",
        "2:a:f:0:9:1",
        "02-0a-ff-00-9c-01",
        "+2:00:00:00:00:00",
    ] {
        assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
    }
}
