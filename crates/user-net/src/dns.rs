//! Messages of the Domain Name System (RFC 1035 §4), as far as a forwarder looks into them.

use alloc::{string::String, vec::Vec};
use core::net::Ipv4Addr;

const HEADER: usize = 12;
const RESPONSE: u8 = 0x80;
/// Questions for an IPv4 address, for any, and in the Internet.
pub(crate) const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;
/// Codes of answers.
pub(crate) const NO_ERROR: u8 = 0;
pub(crate) const SERVER_FAILURE: u8 = 2;
pub(crate) const REFUSED: u8 = 5;
/// The most records that are looked at.
const MOST_RECORDS: usize = 256;

/// What is asked: one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The number that the answer carries too.
    pub id: u16,
    /// The name in lower case, without a dot at its end.
    pub name: String,
    /// The type of record.
    pub kind: u16,
    /// Where the message's next part begins.
    end: usize,
}

/// An address that a name has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The address.
    pub address: Ipv4Addr,
    /// For how many seconds that holds.
    pub ttl: u32,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(field.try_into().ok()?))
}

/// Reads the one question of a query or an answer; `None` for everything else.
pub fn parse_question(message: &[u8]) -> Option<Question> {
    if be16(message, 4)? != 1 || message.get(2)? & 0x78 != 0 {
        return None;
    }
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => break,
            // In a question there is nothing before it to point at.
            64.. => return None,
            _ => {}
        }
        if !name.is_empty() {
            name.push('.');
        }
        for byte in message.get(at..at + len)? {
            // A dot within a part, or a control character, is no name that a rule could mean.
            if !byte.is_ascii_graphic() || *byte == b'.' {
                return None;
            }
            name.push(byte.to_ascii_lowercase().into());
        }
        at += len;
    }
    if name.len() > 253 || be16(message, at + 2)? != CLASS_IN {
        return None;
    }
    Some(Question {
        id: be16(message, 0)?,
        name,
        kind: be16(message, at)?,
        end: at + 4,
    })
}

/// Whether a message is a query.
pub(crate) fn is_query(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & RESPONSE == 0)
}

/// Reads the addresses in an answer and the question that it answers, whatever names lead from one to the other. A
/// message that breaks off gives those before.
pub fn parse_answers(message: &[u8]) -> Option<(Question, Vec<Answer>)> {
    if is_query(message) {
        return None;
    }
    let question = parse_question(message)?;
    let count = usize::from(be16(message, 6)?).min(MOST_RECORDS);
    let mut answers = Vec::new();
    let mut at = question.end;
    for _ in 0..count {
        let Some((answer, next)) = record(message, at) else {
            break;
        };
        answers.extend(answer);
        at = next;
    }
    Some((question, answers))
}

/// The record at `at` if it is an address, and where the next one is.
fn record(message: &[u8], mut at: usize) -> Option<(Option<Answer>, usize)> {
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => break,
            192.. => {
                at += 1;
                break;
            }
            64.. => return None,
            _ => at += len,
        }
    }
    let (kind, class) = (be16(message, at)?, be16(message, at + 2)?);
    let ttl = u32::from(be16(message, at + 4)?) << 16 | u32::from(be16(message, at + 6)?);
    let len = usize::from(be16(message, at + 8)?);
    let data = message.get(at + 10..at + 10 + len)?;
    let address = <[u8; 4]>::try_from(data).ok();
    let answer = address
        .filter(|_| kind == TYPE_A && class == CLASS_IN)
        .map(|address| Answer {
            address: address.into(),
            ttl,
        });
    Some((answer, at + 10 + len))
}

/// An answer of our own to `query`: an error, or the address that is asked for.
pub(crate) fn answer(
    query: &[u8],
    question: &Question,
    code: u8,
    address: Option<Ipv4Addr>,
) -> Option<Vec<u8>> {
    let mut out = query.get(..question.end)?.to_vec();
    // An answer, with recursion as it was wanted; recursion is there.
    *out.get_mut(2)? = RESPONSE | out.get(2)? & 1;
    *out.get_mut(3)? = 0x80 | code;
    out.get_mut(6..HEADER)?.fill(0);
    if let Some(address) = address {
        *out.get_mut(7)? = 1;
        // The name is that of the question.
        out.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        out.extend(address.octets());
    }
    Some(out)
}
