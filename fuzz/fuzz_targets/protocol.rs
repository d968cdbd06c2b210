//! The frames of the data plane, as a server and as a client read them: what is understood is written back the same.

#![no_main]

use engine::remote::frame::{Failure, Header, Hello, Kind, Welcome};
use engine::remote::message::{Request, listed_frames, listed_from_body, sized_frame, sized_from_body};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some(bytes) = data.first_chunk()
        && let Ok(hello) = Hello::from_bytes(bytes)
    {
        assert_eq!(&hello.to_bytes(), bytes);
    }
    if let Some(bytes) = data.first_chunk()
        && let Ok(welcome) = Welcome::from_bytes(bytes)
    {
        assert_eq!(&welcome.to_bytes(), bytes);
    }
    let Some((start, body)) = data.split_first_chunk::<{ Header::BYTES }>() else { return };
    for header in [Header::of_request(start), Header::of_answer(start)].into_iter().flatten() {
        assert_eq!(&header.to_bytes(), start);
        let Some(body) = body.get(..header.body_bytes) else { continue };
        let frame = [start.as_slice(), body].concat();
        match header.kind {
            Kind::Read | Kind::Size | Kind::List | Kind::Get => {
                if let Ok(request) = Request::from_body(header.kind, body) {
                    assert_eq!(request.to_frame(header.id), frame);
                }
            }
            Kind::Data => {}
            Kind::Sized => {
                if let Ok(size) = sized_from_body(body) {
                    assert_eq!(sized_frame(header.id, size), frame);
                }
            }
            Kind::Listed => {
                let mut entries = Vec::new();
                if listed_from_body("d", body, &mut entries).is_ok() {
                    let again = listed_frames(header.id, &entries);
                    assert!(again.len() == 1 && again[0][Header::BYTES..] == *body);
                }
            }
            Kind::Failed => {
                if let Ok(failure) = Failure::from_body(body) {
                    assert_eq!(failure.to_frame(header.id), frame);
                }
            }
        }
    }
});
