//! *PROTOCOL.md* has a worked example in hex. These tests read that very hex: what the document says is what the code
//! writes and reads.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

use engine::remote::frame::{
    DETAIL_BYTES_MAX, Failure, FailureCode, Header, Hello, KEY_BYTES_MAX, Kind, PIECE_BYTES_MAX, RANGES_MAX,
    READ_BYTES_MAX, VERSION, Welcome,
};
use engine::remote::message::{ByteRange, Request};
use engine::remote::{LeaseId, Token};

const DOCUMENT: &str = include_str!("../PROTOCOL.md");
const ID: u64 = 7;

fn bytes_of(title: &str) -> Vec<u8> {
    let start = DOCUMENT.split_once(&format!("```hex {title}\n")).unwrap_or_else(|| panic!("no block \"{title}\"")).1;
    let mut bytes: Vec<u8> = Vec::new();
    for line in start.split_once("```").unwrap().0.lines().filter(|line| *line != "*") {
        let (offset, rest) = line.split_at(8);
        let offset = usize::from_str_radix(offset, 16).unwrap();
        while bytes.len() < offset {
            bytes.extend_from_within(bytes.len() - 16..);
        }
        let hex = rest.split('|').next().unwrap().split_whitespace();
        bytes.extend(hex.map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    }
    bytes
}

/// As `hexdump -C` prints it, for whoever changes the protocol.
fn hexdump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (index, line) in bytes.chunks(16).enumerate() {
        let hex: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let (left, right) = hex.split_at(hex.len().min(8));
        let printable = |byte: &u8| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' };
        let text: String = line.iter().map(printable).collect();
        out += &format!("{:08x}  {:<23}  {:<23}  |{text}|\n", index * 16, left.join(" "), right.join(" "));
    }
    out + &format!("{:08x}\n", bytes.len())
}

fn hello() -> Hello {
    let mut lease = [0; 16];
    (0..).zip(&mut lease).for_each(|(number, byte)| *byte = number * 0x11);
    Hello { version: VERSION, lease: LeaseId(lease), token: Token::new([0xa5; 32]) }
}

fn request() -> Request {
    let ranges = vec![ByteRange { offset: 4096, bytes: 3 }, ByteRange { offset: 8192, bytes: 2 }];
    Request::Read { key: "clusters/main/packs/00000001.pack".to_owned(), ranges }
}

fn failure() -> Failure {
    let offset = Some(8192);
    Failure { code: FailureCode::Refused, errno: 0, offset, detail: "not covered by the lease".to_owned() }
}

fn data() -> Vec<u8> {
    let piece = |is_last, bytes: &[u8]| {
        let header = Header { kind: Kind::Data, is_last, body_bytes: bytes.len(), id: ID };
        [header.to_bytes().as_slice(), bytes].concat()
    };
    [piece(false, b"15\n"), piece(true, b"AB")].concat()
}

fn header_at(bytes: &[u8], start: usize) -> [u8; Header::BYTES] {
    bytes[start..start + Header::BYTES].try_into().unwrap()
}

#[test]
fn the_document_has_what_the_code_writes() {
    let welcome = Welcome { version: VERSION, refusal: None, requests_max: 32 };
    for (title, written) in [
        ("hello", hello().to_bytes().to_vec()),
        ("welcome", welcome.to_bytes().to_vec()),
        ("read", request().to_frame(ID)),
        ("data", data()),
        ("failed", failure().to_frame(ID)),
    ] {
        assert!(bytes_of(title) == written, "PROTOCOL.md differs; the code writes {title} as\n{}", hexdump(&written));
    }
}

#[test]
fn the_code_reads_what_the_document_has() {
    assert_eq!(Hello::from_bytes(&bytes_of("hello").try_into().unwrap()), Ok(hello()));
    let welcome = Welcome::from_bytes(&bytes_of("welcome").try_into().unwrap()).unwrap();
    assert_eq!((welcome.version, welcome.refusal, welcome.requests_max), (1, None, 32));

    let read = bytes_of("read");
    let header = Header::of_request(&header_at(&read, 0)).unwrap();
    assert_eq!((header.kind, header.id, header.body_bytes), (Kind::Read, ID, read.len() - Header::BYTES));
    assert_eq!(Request::from_body(header.kind, &read[Header::BYTES..]), Ok(request()));

    let (answer, mut content, mut start) = (bytes_of("data"), Vec::new(), 0);
    while start < answer.len() {
        let header = Header::of_answer(&header_at(&answer, start)).unwrap();
        let body = start + Header::BYTES;
        start = body + header.body_bytes;
        assert_eq!((header.kind, header.id, header.is_last), (Kind::Data, ID, start == answer.len()));
        content.extend_from_slice(&answer[body..start]);
    }
    assert_eq!(content, b"15\nAB");

    let failed = bytes_of("failed");
    assert_eq!(Header::of_answer(&header_at(&failed, 0)).unwrap().kind, Kind::Failed);
    assert_eq!(Failure::from_body(&failed[Header::BYTES..]), Ok(failure()));
}

/// The numbers of the document's tables.
#[test]
fn the_documented_limits_are_those_of_the_code() {
    let key = KEY_BYTES_MAX;
    for (kind, longest) in [
        (1, 8 + 12 * RANGES_MAX + key),
        (2, key),
        (3, key),
        (4, 8 + key),
        (129, PIECE_BYTES_MAX),
        (130, 8),
        (131, PIECE_BYTES_MAX),
        (132, 12 + DETAIL_BYTES_MAX),
    ] {
        let side = if kind < 129 { "client" } else { "server" };
        let row = DOCUMENT.lines().find(|line| line.starts_with(&format!("| {kind} | {side} | "))).unwrap();
        assert!(row.ends_with(&format!(" {longest} |")), "{row}");
        let mut header = [0; Header::BYTES];
        (header[4], header[5]) = (kind, 1);
        let parse = |length: usize| {
            let mut header = header;
            header[..4].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
            if kind < 129 { Header::of_request(&header) } else { Header::of_answer(&header) }
        };
        assert!(parse(longest).is_ok() && parse(longest + 1).is_err(), "kind {kind}");
    }
    assert!(DOCUMENT.contains(&format!("{} MiB", READ_BYTES_MAX >> 20)));
    assert!(DOCUMENT.contains(&format!("from 1 to {RANGES_MAX}")));
}
