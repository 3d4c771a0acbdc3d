//! Damage to files: cuts, flips, repetitions, and numbers that are too large.

use proptest::prelude::*;
use proptest::test_runner::Config;

/// One change to the bytes of a file; positions are taken modulo its length.
#[derive(Clone, Debug)]
pub enum Damage {
    Truncate(usize),
    Replace(usize, u8),
    Insert(usize, String),
    Delete(usize, usize),
    Repeat(usize, usize),
    /// Replaces the next number by another one.
    Number(usize, String),
    /// Repeats the line at a position.
    Line(usize),
}

/// Pieces of text that are hard for readers.
const SCRAPS: &[&str] = &[
    "NaN",
    "-",
    "-1",
    "1e999",
    "4294967296",
    "99999999999999999999",
    "\"",
    "\n",
    "\r\n",
    ",",
    "{",
    "[[[[",
    "\u{feff}",
    "é",
    ": &a *a",
    "&a [*a]",
    "!!binary x",
    "? :",
    "- ",
    "\t",
    ".nan",
    ".inf",
    "null",
    "\u{0}",
    "0",
    ".",
];

/// Numbers that readers must not use as a size.
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "1073741824",
    "1073741825",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e18",
    "1e400",
    "0.5",
];

/// Any damage at any position.
pub fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<usize>().prop_map(Damage::Truncate),
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Damage::Replace(at, byte)),
        (any::<usize>(), prop::sample::select(SCRAPS)).prop_map(|(at, scrap)| Damage::Insert(at, scrap.to_owned())),
        (any::<usize>(), 1..40_usize).prop_map(|(at, length)| Damage::Delete(at, length)),
        (any::<usize>(), 1..40_usize).prop_map(|(at, length)| Damage::Repeat(at, length)),
        (any::<usize>(), prop::sample::select(NUMBERS)).prop_map(|(at, number)| Damage::Number(at, number.to_owned())),
        any::<usize>().prop_map(Damage::Line),
    ]
}

/// The bytes after all damages.
pub fn damaged(contents: impl AsRef<[u8]>, damages: &[Damage]) -> Vec<u8> {
    let mut bytes = contents.as_ref().to_vec();
    for damage in damages {
        let place = |at: usize| at % bytes.len().max(1);
        let part = |at: usize, length: usize| place(at)..(place(at) + length).min(bytes.len());
        match damage {
            Damage::Truncate(at) => bytes.truncate(place(*at)),
            Damage::Replace(at, byte) => {
                let at = place(*at);
                if let Some(old) = bytes.get_mut(at) {
                    *old = *byte;
                }
            }
            Damage::Insert(at, scrap) => drop(bytes.splice(place(*at)..place(*at), scrap.bytes()).count()),
            Damage::Delete(at, length) => drop(bytes.drain(part(*at, *length))),
            Damage::Repeat(at, length) => {
                let copy = bytes[part(*at, *length)].to_vec();
                bytes.splice(place(*at)..place(*at), copy);
            }
            Damage::Number(at, number) => {
                let is_digit = |byte: &u8| byte.is_ascii_digit();
                if let Some(start) = bytes[place(*at)..].iter().position(is_digit).map(|found| place(*at) + found) {
                    let digits = bytes[start..].iter().take_while(|byte| is_digit(byte)).count();
                    bytes.splice(start..start + digits, number.bytes());
                }
            }
            Damage::Line(at) => {
                let start = bytes[..place(*at)].iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
                let end =
                    bytes[start..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |end| start + end + 1);
                let copy = bytes[start..end].to_vec();
                bytes.splice(start..start, copy);
            }
        }
    }
    bytes
}

/// Number of cases of a test: a few hundred, or `PROPTEST_CASES`.
pub fn cases() -> Config {
    const CASES: u32 = 400;
    Config { cases: Config::default().cases.max(CASES), ..Config::default() }
}
