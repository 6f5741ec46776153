//! A message of the Domain Name System, from a guest or a resolver.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let asked = caisson_user_net::parse_question(message);
    let answered = caisson_user_net::parse_answers(message);
    if let Some((question, answers)) = answered {
        assert_eq!(Some(question), asked);
        assert!(answers.len() * 4 <= message.len());
    }
});
