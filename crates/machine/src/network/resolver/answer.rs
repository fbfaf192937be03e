//! What a question deserves, and what of an upstream answer the guest gets. No I/O.

use std::{collections::HashSet, net::Ipv4Addr, time::Duration};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType},
};

use super::{
    super::egress::{EgressPolicy, is_name},
    LARGEST_DATAGRAM,
};

/// Addresses of a name stay open that long at least, whatever its time to live: a client resolves first and connects some time later.
const OPEN_AT_LEAST: Duration = Duration::from_secs(60);
/// And no longer than that; the guest is told to ask again by then.
const OPEN_AT_MOST: Duration = Duration::from_secs(3600);
/// Aliases that are followed in an answer.
const MOST_ALIASES: usize = 16;
/// Records of an upstream answer that are looked at.
const MOST_RECORDS: usize = 64;

/// What is to be done about a question.
#[derive(Debug)]
pub enum Verdict {
    /// It is none.
    Ignore,
    /// The answer is known.
    Answer(Message),
    /// The policy allows it; the name as policies write it.
    Ask(String),
}

/// An upstream answer, made fit for the guest.
#[derive(Debug)]
pub struct Relayed {
    pub answer: Message,
    /// Addresses that the guest may connect to from now on.
    pub openings: Vec<Ipv4Addr>,
    /// For how long.
    pub time: Duration,
}

/// Judges a question.
pub fn judge(policy: &EgressPolicy, request: &Message) -> Verdict {
    if request.metadata.message_type != MessageType::Query {
        return Verdict::Ignore;
    }
    if request.metadata.op_code != OpCode::Query {
        return Verdict::Answer(reply(request, ResponseCode::NotImp));
    }
    let [query] = request.queries.as_slice() else { return Verdict::Answer(reply(request, ResponseCode::FormErr)) };
    match text_of(&query.name).filter(|name| policy.allows_name(name)) {
        None => Verdict::Answer(refused(request)),
        Some(_) if query.query_class != DNSClass::IN || !is_asked_for(query.query_type) => Verdict::Answer(empty(request)),
        Some(name) => Verdict::Ask(name),
    }
}

/// Types that are asked for upstream. Others have no records here: IPv6 addresses, and hints of addresses that would not be open.
fn is_asked_for(kind: RecordType) -> bool {
    use RecordType::{A, CAA, CNAME, MX, NAPTR, NS, PTR, SOA, SRV, TXT};
    matches!(kind, A | CAA | CNAME | MX | NAPTR | NS | PTR | SOA | SRV | TXT)
}

/// Takes what answers the question from an upstream response: its records and the aliases that lead to them. None when an alias leads to a
/// name that the policy denies.
pub fn relay(policy: &EgressPolicy, request: &Message, response: &Message) -> Option<Relayed> {
    let query = request.queries.first()?;
    let mut answer = reply(request, response.metadata.response_code);
    let mut owner = query.name.to_lowercase();
    for _ in 0..MOST_ALIASES {
        if text_of(&owner).is_some_and(|name| policy.denies_name(&name)) {
            return None;
        }
        let own = || response.answers.iter().take(MOST_RECORDS).filter(|record| record.name.to_lowercase() == owner);
        answer.answers.extend(own().filter(|record| record.record_type() == query.query_type).cloned());
        let alias = own().find_map(|record| match &record.data {
            RData::CNAME(target) if query.query_type != RecordType::CNAME => Some((record.clone(), target.0.to_lowercase())),
            _ => None,
        });
        let Some((record, target)) = alias else { break };
        answer.answers.push(record);
        owner = target;
    }
    let time = clamp_lives(&mut answer.answers);
    let openings: HashSet<_> = answer.answers.iter().filter_map(address).filter(|address| may_be_opened(*address)).collect();
    Some(Relayed { answer, openings: openings.into_iter().collect(), time })
}

/// Bounds the records' times to live; returns how long their addresses are to be open.
fn clamp_lives(records: &mut [Record]) -> Duration {
    let most = u32::try_from(OPEN_AT_MOST.as_secs()).expect("an hour");
    for record in records.iter_mut() {
        record.ttl = record.ttl.min(most);
    }
    let longest = records.iter().map(|record| record.ttl).max().unwrap_or(0);
    Duration::from_secs(longest.into()).max(OPEN_AT_LEAST)
}

fn address(record: &Record) -> Option<Ipv4Addr> {
    match &record.data {
        RData::A(address) => Some(address.0),
        _ => None,
    }
}

/// Whether an address may be opened because a name has it. Whoever runs the name's servers chooses it, so it must be a public one.
fn may_be_opened(address: Ipv4Addr) -> bool {
    let [first, second, ..] = address.octets();
    let shared = first == 100 && (64..128).contains(&second);
    !(first == 0 || first >= 224 || shared || address.is_private() || address.is_loopback() || address.is_link_local())
}

/// A name as policies write it, unless it has characters that those never have.
fn text_of(name: &Name) -> Option<String> {
    let labels: Vec<_> = name.iter().map(|label| str::from_utf8(label).ok().filter(|text| !text.contains('.'))).collect::<Option<_>>()?;
    Some(labels.join(".").to_ascii_lowercase()).filter(|text| is_name(text))
}

/// The name does not exist, as far as the guest is concerned.
pub fn refused(request: &Message) -> Message {
    reply(request, ResponseCode::NXDomain)
}

/// The name exists and has nothing of the kind.
fn empty(request: &Message) -> Message {
    reply(request, ResponseCode::NoError)
}

/// There is no answer to be had now.
pub fn failed(request: &Message) -> Message {
    reply(request, ResponseCode::ServFail)
}

/// The answer to what cannot be read. None if it may be an answer itself, or is too short to have an id.
pub fn unreadable(question: &[u8]) -> Option<Message> {
    match question {
        [high, low, flags, ..] if flags & 0x80 == 0 => {
            Some(Message::error_msg(u16::from_be_bytes([*high, *low]), OpCode::Query, ResponseCode::FormErr))
        }
        _ => None,
    }
}

fn reply(request: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::response(request.metadata.id, request.metadata.op_code);
    answer.metadata.recursion_desired = request.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    answer.queries.extend(request.queries.first().cloned());
    if request.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(LARGEST_DATAGRAM);
        answer.set_edns(edns);
    }
    answer
}

/// An answer as bytes; without its records, and marked so that the client asks by TCP, if they are too many.
pub fn to_bytes(answer: &Message, limit: usize) -> Option<Vec<u8>> {
    let bytes = answer.to_vec().ok()?;
    if bytes.len() <= limit { Some(bytes) } else { answer.truncate().to_vec().ok() }
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::Query,
        rr::rdata::{A, CNAME},
    };

    use super::*;

    fn policy() -> EgressPolicy {
        EgressPolicy::parse("*.example.com:443", "secret.example.com").unwrap()
    }

    fn question(name: &str, kind: RecordType) -> Message {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn record(name: &str, ttl: u32, data: RData) -> Record {
        Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, data)
    }

    fn a(name: &str, ttl: u32, address: &str) -> Record {
        record(name, ttl, RData::A(A(address.parse().unwrap())))
    }

    fn alias(name: &str, target: &str) -> Record {
        record(name, 300, RData::CNAME(CNAME(Name::from_ascii(target).unwrap())))
    }

    fn code(verdict: Verdict) -> ResponseCode {
        match verdict {
            Verdict::Answer(answer) => answer.metadata.response_code,
            other => panic!("{other:?}"),
        }
    }

    fn relayed(request: &Message, answers: Vec<Record>) -> Option<Relayed> {
        let mut response = Message::response(1, OpCode::Query);
        response.answers = answers;
        relay(&policy(), request, &response)
    }

    #[test]
    fn only_allowed_names_and_known_types_are_asked_for() {
        let judged = |name, kind| judge(&policy(), &question(name, kind));
        assert!(matches!(judged("WWW.Example.com.", RecordType::A), Verdict::Ask(name) if name == "www.example.com"));
        assert!(matches!(judged("www.example.com.", RecordType::TXT), Verdict::Ask(_)));
        assert_eq!(code(judged("www.example.com.", RecordType::AAAA)), ResponseCode::NoError);
        assert_eq!(code(judged("www.example.com.", RecordType::HTTPS)), ResponseCode::NoError);
        for name in ["example.com.", "example.org.", "secret.example.com.", "."] {
            assert_eq!(code(judged(name, RecordType::A)), ResponseCode::NXDomain, "{name}");
        }
    }

    #[test]
    fn a_dot_within_a_label_does_not_make_a_name_another_one() {
        let name = Name::from_labels([b"x.example".as_slice(), b"com"]).unwrap();
        assert_eq!(text_of(&name), None);
    }

    #[test]
    fn what_is_no_question_is_not_answered_and_what_is_a_bad_one_is() {
        let mut response = question("www.example.com.", RecordType::A);
        response.metadata.message_type = MessageType::Response;
        assert!(matches!(judge(&policy(), &response), Verdict::Ignore));
        let mut two = question("www.example.com.", RecordType::A);
        two.queries.push(two.queries[0].clone());
        assert_eq!(code(judge(&policy(), &two)), ResponseCode::FormErr);
        assert_eq!(unreadable(&[1, 2, 0]).unwrap().metadata.id, 0x0102);
        assert!(unreadable(&[1, 2, 0x80]).is_none());
        assert!(unreadable(&[1]).is_none());
    }

    #[test]
    fn the_chain_of_aliases_is_kept_and_nothing_beside_it() {
        let request = question("www.example.com.", RecordType::A);
        let answers = vec![
            a("cdn.example.net.", 7200, "192.0.2.7"),
            a("other.example.net.", 60, "192.0.2.9"),
            alias("Www.example.com.", "cdn.EXAMPLE.net."),
        ];
        let relayed = relayed(&request, answers).unwrap();
        assert_eq!(relayed.openings, [Ipv4Addr::new(192, 0, 2, 7)]);
        assert_eq!(relayed.answer.answers.len(), 2);
        assert_eq!(relayed.time, OPEN_AT_MOST);
        assert!(relayed.answer.answers.iter().all(|record| record.ttl <= 3600));
        assert_eq!(relayed.answer.metadata.id, request.metadata.id);
    }

    #[test]
    fn an_alias_to_a_denied_name_is_refused_and_a_ring_of_aliases_ends() {
        let request = question("www.example.com.", RecordType::A);
        assert!(
            relayed(&request, vec![alias("www.example.com.", "secret.example.com."), a("secret.example.com.", 60, "192.0.2.7")]).is_none()
        );
        let ring = vec![alias("www.example.com.", "b.test."), alias("b.test.", "www.example.com.")];
        assert!(relayed(&request, ring).unwrap().openings.is_empty());
    }

    #[test]
    fn private_addresses_are_answered_and_not_opened() {
        let request = question("www.example.com.", RecordType::A);
        let private = ["10.1.2.3", "127.0.0.1", "169.254.169.254", "100.64.0.1", "172.16.0.1", "192.168.1.1", "0.0.0.0", "224.0.0.1"];
        let answers = private.iter().map(|address| a("www.example.com.", 5, address)).collect();
        let relayed = relayed(&request, answers).unwrap();
        assert!(relayed.openings.is_empty());
        assert_eq!(relayed.answer.answers.len(), private.len());
        assert_eq!(relayed.time, OPEN_AT_LEAST);
    }

    #[test]
    fn an_answer_that_is_too_long_is_cut_to_its_question() {
        let request = question("www.example.com.", RecordType::A);
        let answers = (0..60).map(|last| a("www.example.com.", 60, &format!("192.0.2.{last}"))).collect();
        let relayed = relayed(&request, answers).unwrap();
        let cut = Message::from_vec(&to_bytes(&relayed.answer, 512).unwrap()).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        assert_eq!(cut.queries, request.queries);
        let whole = Message::from_vec(&to_bytes(&relayed.answer, 65_535).unwrap()).unwrap();
        assert_eq!(whole.answers.len(), 60);
    }
}
