//! Server-sent events: the `data` of each event, from bytes in pieces of any size.

/// Most bytes of one event.
const LONGEST_EVENT: usize = 16 << 20;

/// An event that would fill the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found an event of more than {LONGEST_EVENT} bytes, expected a shorter one")]
pub struct EventTooLong;

/// Decodes a stream of server-sent events as the HTML standard defines it (section 9.2.6). Only the field `data` is read;
/// comments and other fields are skipped.
#[derive(Clone, Debug, Default)]
pub struct EventDecoder {
    /// The line that has not ended.
    line: Vec<u8>,
    /// Data of the event that has not ended; `None` without a line of data.
    data: Option<Vec<u8>>,
    /// Whether the last byte was a carriage return, which a line feed may follow as part of the same line end.
    is_after_return: bool,
    /// Whether a line has ended, before which there may be a byte order mark.
    is_past_first_line: bool,
}

impl EventDecoder {
    /// Takes the next bytes of the stream. Returns the data of each event that they complete.
    ///
    /// # Errors
    /// If an event has more than 16 MiB.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EventTooLong> {
        let mut events = Vec::new();
        for &byte in bytes {
            let is_after_return = std::mem::replace(&mut self.is_after_return, byte == b'\r');
            match byte {
                b'\n' if is_after_return => {}
                b'\n' | b'\r' => events.extend(self.end_line()),
                byte => self.line.push(byte),
            }
            if self.line.len() + self.data.as_ref().map_or(0, Vec::len) > LONGEST_EVENT {
                return Err(EventTooLong);
            }
        }
        Ok(events)
    }

    /// Reads the line that has ended. Returns the data of an event that it ends.
    fn end_line(&mut self) -> Option<Vec<u8>> {
        let line = std::mem::take(&mut self.line);
        let mark: &[u8] = if std::mem::replace(&mut self.is_past_first_line, true) { b"" } else { b"\xef\xbb\xbf" };
        let line = line.strip_prefix(mark).unwrap_or(&line);
        if line.is_empty() {
            return self.data.take();
        }
        let (field, value) = match line.iter().position(|&byte| byte == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &[][..]),
        };
        if field == b"data" {
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
                None => self.data = Some(value.to_vec()),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let mut decoder = EventDecoder::default();
        let events = pieces.into_iter().flat_map(|piece| decoder.push(piece).unwrap());
        events.map(|data| String::from_utf8(data).unwrap()).collect()
    }

    const STREAM: &str = "\u{feff}data: {\"a\": \"ä\"}\n\n: comment\r\n\r\nevent: x\rdata:two\r\ndata: lines\r\rid: 7\n\n\
                          data\n\ndata: [DONE]\r\n\r\ndata: cut off\n";

    #[test]
    fn fields_comments_and_every_line_end_are_read_as_the_standard_says() {
        assert_eq!(decode([STREAM.as_bytes()]), ["{\"a\": \"ä\"}", "two\nlines", "", "[DONE]"]);
    }

    #[test]
    fn a_stream_that_is_split_at_any_byte_has_the_same_events() {
        let whole = decode([STREAM.as_bytes()]);
        for place in 0..=STREAM.len() {
            let (first, second) = STREAM.as_bytes().split_at(place);
            assert_eq!(decode([first, second]), whole, "split at byte {place}");
        }
        assert_eq!(decode(STREAM.as_bytes().chunks(1)), whole);
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut decoder = EventDecoder::default();
        let piece = vec![b'x'; 1 << 20];
        assert_eq!((0..17).find_map(|_| decoder.push(&piece).err()), Some(EventTooLong));
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_give_the_events_of_the_whole(
            bytes in prop::collection::vec(prop::sample::select(b"data:\r\n x\xef\xbb\xbf".to_vec()), 0..200),
            cuts in prop::collection::vec(0_usize..200, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut decoder = EventDecoder::default();
            let mut events = Vec::new();
            for pair in cuts.windows(2) {
                events.extend(decoder.push(&bytes[pair[0]..pair[1]]).unwrap());
            }
            prop_assert_eq!(events, EventDecoder::default().push(&bytes).unwrap());
        }
    }
}
