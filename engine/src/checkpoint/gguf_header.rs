//! The header of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md), read where it lies: no length in it is believed
//! before that many bytes are there, and arrays are decoded when they are asked for. candle's reader divides by the
//! file's alignment, which a damaged file gives as zero.

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;
use serde_json::{Map, Value, json};

/// What is wrong with a file.
type Result<T, E = String> = std::result::Result<T, E>;

/// The header of a GGUF file.
pub(super) struct Header<'a> {
    /// Values by key; of an array, only what it is.
    pub values: Map<String, Value>,
    arrays: BTreeMap<&'a str, Array<'a>>,
    tensors: BTreeMap<&'a str, TensorInfo>,
    /// The file from the first tensor on.
    data: &'a [u8],
}

/// An array of a header, not yet decoded.
struct Array<'a> {
    kind: u32,
    count: usize,
    bytes: &'a [u8],
}

/// Where a tensor is and what it is made of.
pub(super) struct TensorInfo {
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// Its number format.
    pub dtype: GgmlDType,
    offset: usize,
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl<'a> Header<'a> {
    /// Reads the header of a whole file.
    pub fn read(file: &'a [u8]) -> Result<Self> {
        let mut cursor = Cursor { rest: file, length: file.len() };
        let (magic, version) = (cursor.take(4)?, cursor.u32()?);
        if magic != b"GGUF" {
            return Err("it does not begin with \"GGUF\"".to_owned());
        }
        match (version, version.swap_bytes()) {
            (2 | 3, _) => {}
            (_, 2 | 3) => return Err("it is for big-endian machines: convert the model anew".to_owned()),
            _ => return Err(format!("version {version}, expected 2 or 3: convert the model anew")),
        }
        let (num_tensors, num_values) = (cursor.size()?, cursor.size()?);
        let (mut values, mut arrays, mut tensors) = (Map::new(), BTreeMap::new(), BTreeMap::new());
        for _ in 0..num_values {
            let (key, kind) = (cursor.string()?, cursor.u32()?);
            let value = match kind {
                ARRAY => {
                    let array = cursor.array()?;
                    let what = json!(format!("an array of {}", array.count));
                    arrays.insert(key, array);
                    what
                }
                _ => cursor.scalar(kind)?,
            };
            if values.insert(key.to_owned(), value).is_some() {
                return Err(format!("key `{key}` is there twice"));
            }
        }
        for _ in 0..num_tensors {
            let name = cursor.string()?;
            let info = cursor.tensor_info().map_err(|message| format!("tensor `{name}`: {message}"))?;
            if tensors.insert(name, info).is_some() {
                return Err(format!("tensor `{name}` is there twice"));
            }
        }
        // Numbers are read in place, so they must lie as their type demands.
        let alignment = values.get("general.alignment").map_or(Some(32), Value::as_u64).unwrap_or(0) as usize;
        if !alignment.is_power_of_two() || alignment < 8 {
            return Err(format!("`general.alignment` is {alignment}, expected a power of two from 8"));
        }
        if let Some((name, info)) = tensors.iter().find(|(_, info)| !info.offset.is_multiple_of(alignment)) {
            return Err(format!("tensor `{name}` is at {}, expected a multiple of {alignment}", info.offset));
        }
        let start = (file.len() - cursor.rest.len()).next_multiple_of(alignment);
        Ok(Self { values, arrays, tensors, data: file.get(start..).unwrap_or_default() })
    }

    /// The names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &'a str> {
        self.tensors.keys().copied()
    }

    /// What is known of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// A tensor's bytes.
    pub fn bytes(&self, info: &TensorInfo) -> Result<&'a [u8]> {
        let count = info.shape.iter().try_fold(1_usize, |count, size| count.checked_mul(*size));
        let blocks = count.map(|count| count / info.dtype.block_size());
        let bytes = blocks.and_then(|blocks| blocks.checked_mul(info.dtype.type_size()));
        let end = bytes.and_then(|bytes| bytes.checked_add(info.offset));
        let found = end.and_then(|end| self.data.get(info.offset..end));
        found.ok_or_else(|| {
            let (shape, dtype, offset) = (&info.shape, info.dtype, info.offset);
            format!("{shape:?} of {dtype:?} from byte {offset} on, but there are {} bytes", self.data.len())
        })
    }

    /// The strings of an array, if there is such a key.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.decode(key, |cursor, kind| match kind {
            STRING => cursor.string(),
            _ => Err(format!("values of type {kind}, expected strings")),
        })
    }

    /// The numbers of an array, if there is such a key.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.decode(key, |cursor, kind| {
            let value = cursor.scalar(kind)?;
            value.as_f64().ok_or_else(|| format!("holds {value}, expected numbers"))
        })
    }

    fn decode<T>(&self, key: &str, read: impl Fn(&mut Cursor<'a>, u32) -> Result<T>) -> Result<Option<Vec<T>>> {
        let Some(array) = self.arrays.get(key) else {
            return Ok(None);
        };
        let mut cursor = Cursor { rest: array.bytes, length: array.bytes.len() };
        let values = (0..array.count).map(|_| read(&mut cursor, array.kind));
        values.collect::<Result<_>>().map(Some).map_err(|message| format!("`{key}` {message}"))
    }
}

/// What is left to read.
struct Cursor<'a> {
    rest: &'a [u8],
    /// Bytes there were.
    length: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let at = self.length - self.rest.len();
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or_else(|| format!("{count} bytes expected at {at}, the file has {}", self.length))?;
        self.rest = rest;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.fixed().map(u32::from_le_bytes)
    }

    fn size(&mut self) -> Result<usize> {
        let size = self.fixed().map(u64::from_le_bytes)?;
        usize::try_from(size).map_err(|_| format!("a length of {size}"))
    }

    fn string(&mut self) -> Result<&'a str> {
        let length = self.size()?;
        std::str::from_utf8(self.take(length)?).map_err(|error| format!("a string is no UTF-8: {error}"))
    }

    fn scalar(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => json!(u8::from_le_bytes(self.fixed()?)),
            1 => json!(i8::from_le_bytes(self.fixed()?)),
            2 => json!(u16::from_le_bytes(self.fixed()?)),
            3 => json!(i16::from_le_bytes(self.fixed()?)),
            4 => json!(u32::from_le_bytes(self.fixed()?)),
            5 => json!(i32::from_le_bytes(self.fixed()?)),
            6 => json!(f32::from_le_bytes(self.fixed()?)),
            7 => json!(u8::from_le_bytes(self.fixed()?) != 0),
            STRING => json!(self.string()?),
            10 => json!(u64::from_le_bytes(self.fixed()?)),
            11 => json!(i64::from_le_bytes(self.fixed()?)),
            12 => json!(f64::from_le_bytes(self.fixed()?)),
            _ => return Err(format!("a value of type {kind}, expected 0 to 12")),
        })
    }

    fn array(&mut self) -> Result<Array<'a>> {
        let (kind, count) = (self.u32()?, self.size()?);
        let before = self.rest;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            STRING => {
                // Every string takes eight bytes at least, so this ends with the file.
                (0..count).try_for_each(|_| self.string().map(drop))?;
                0
            }
            _ => return Err(format!("an array of type {kind}, expected numbers or strings")),
        };
        self.take(count.checked_mul(width).ok_or_else(|| format!("an array of {count}"))?)?;
        Ok(Array { kind, count, bytes: &before[..before.len() - self.rest.len()] })
    }

    fn tensor_info(&mut self) -> Result<TensorInfo> {
        const MAX_DIMS: u32 = 4;
        let dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(format!("{dims} dimensions, expected 1 to {MAX_DIMS}"));
        }
        let mut shape = (0..dims).map(|_| self.size()).collect::<Result<Vec<_>>>()?;
        shape.reverse();
        let dtype = dtype(self.u32()?)?;
        Ok(TensorInfo { shape, dtype, offset: self.size()? })
    }
}

/// The number formats that candle can dequantize, by their number in the file.
fn dtype(number: u32) -> Result<GgmlDType> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => {
            let name =
                OTHER_FORMATS.iter().find(|(known, _)| *known == number).map_or("an unknown one", |(_, name)| name);
            return Err(format!(
                "number format {number} ({name}), expected F32, F16, BF16, Q4_0 to Q8_0 or Q2_K to Q6_K"
            ));
        }
    })
}

/// Number formats of llama.cpp that candle cannot dequantize.
const OTHER_FORMATS: [(u32, &str); 22] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];
