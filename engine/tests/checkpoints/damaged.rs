//! Damaged or unsupported checkpoints are rejected by name, at once, and without more memory than the length of their
//! files.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use engine::Model as EngineModel;
use engine::config::{LoraConfig, LoraRanks, ModelConfig};
use engine::weights::{Stored, Weights};
use engine::{Checkpoint, WeightType};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::folders::{Model, Tensors};
use super::gguf::write_gguf;

/// The system's allocator, which records the largest request of each thread.
struct Largest;

thread_local! {
    /// The largest request.
    pub static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every request goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // The report of a panic that a reader catches may read the symbols of the whole program.
        if !std::thread::panicking() {
            let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        }
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

pub fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 19, "hidden_size": 8,
        "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": false,
    })
}

pub fn gemma() -> Value {
    json!({
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": 19, "hidden_size": 8,
        "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    })
}

pub fn gemma3() -> Value {
    json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 19, "hidden_size": 8,
        "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 4,
    })
}

fn refusal(path: &Path, num_loops: usize) -> String {
    Checkpoint::read(path, num_loops).map(drop).unwrap_err().to_string()
}

/// The error for a folder with a changed configuration.
fn refusal_with(mut config: Value, key: &str, value: Value) -> String {
    let folder = tempfile::tempdir().unwrap();
    Model::random(config.clone(), 1).write(folder.path());
    config[key] = value;
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    refusal(folder.path(), 1)
}

#[test]
fn what_is_not_supported_is_refused_by_its_key() {
    for (config, key, value, expected) in [
        (llama(), "architectures", json!(["MixtralForCausalLM"]), "expected one of LlamaForCausalLM"),
        (llama(), "hidden_act", json!("relu"), "`hidden_act` is \"relu\", expected one of silu"),
        (llama(), "rope_scaling", json!({"type": "yarn"}), "`rope_scaling.type` is \"yarn\", expected one of default"),
        (
            llama(),
            "rope_scaling",
            json!({"rope_type": "linear"}),
            "`rope_scaling.factor` is missing, expected a number",
        ),
        (llama(), "rope_scaling", json!(3), "`rope_scaling` is 3, expected an object"),
        (llama(), "partial_rotary_factor", json!(0.5), "`partial_rotary_factor` is 0.5, expected null or 1"),
        (
            llama(),
            "quantization_config",
            json!({"bits": 4}),
            "`quantization_config` is {\"bits\":4}, expected null: this engine",
        ),
        (llama(), "hidden_size", json!("wide"), "`hidden_size` is \"wide\", expected a whole number"),
        (llama(), "num_attention_heads", Value::Null, "`num_attention_heads` is null, expected a whole number"),
        (llama(), "num_hidden_layers", json!(1_u64 << 50), "expected from 1 to 4096 layers"),
        (llama(), "num_key_value_heads", json!(3), "`num_kv_heads` is 3, expected a divisor"),
        (gemma(), "use_bidirectional_attention", json!(true), "`use_bidirectional_attention` is true"),
        (gemma3(), "final_logit_softcapping", json!(30.0), "`final_logit_softcapping` is 30.0, expected null: "),
        (gemma3(), "attn_logit_softcapping", json!(50.0), "`attn_logit_softcapping` is 50.0, expected null"),
        (gemma3(), "use_bidirectional_attention", json!(true), "`use_bidirectional_attention` is true"),
        (gemma3(), "layer_types", json!(["full_attention"]), "`layer_types` is [\"full_attention\"], expected 2 of"),
    ] {
        let message = refusal_with(config, key, value);
        assert!(message.contains("config.json: `") && message.contains(expected), "{message}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut model = Model::random(llama(), 1);
        change(&mut model.tensors);
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path());
        refusal(folder.path(), 1)
    };
    let name = "model.layers.1.self_attn.k_proj.weight";
    let wrong = |dtype| Tensor::zeros((8, 4), dtype, &Device::Cpu).unwrap();
    let missing = refused(&|tensors| drop(tensors.remove(name)));
    assert!(
        missing.contains(&format!("model.safetensors: tensor `{name}` is missing, expected shape [4, 8]")),
        "{missing}"
    );
    let misshapen = refused(&|tensors| drop(tensors.insert(name.to_owned(), wrong(DType::F32))));
    assert!(misshapen.contains("has shape [8, 4], expected [4, 8]"), "{misshapen}");
    let integers = refused(&|tensors| {
        let numbers = Tensor::zeros((4, 8), DType::I64, &Device::Cpu).unwrap();
        tensors.insert(name.to_owned(), numbers);
    });
    assert!(integers.contains(name) && integers.contains("expected a float type"), "{integers}");
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let unexpected = refused(&|tensors| drop(tensors.insert(bias.to_owned(), wrong(DType::F32))));
    assert!(unexpected.contains(&format!("unexpected tensor `{bias}`")), "{unexpected}");
}

/// Common mistakes in place of a model, and the remedy that the error names.
#[test]
fn what_is_no_model_is_refused_with_the_remedy() {
    const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538\n";
    let folder = tempfile::tempdir().unwrap();
    let model = Model::random(llama(), 1);
    let path = |name: &str| folder.path().join(name);
    let with = |name: &str, bytes: &[u8], given: &str| {
        model.write(folder.path());
        std::fs::write(path(name), bytes).unwrap();
        let message = refusal(&path(given), 1);
        std::fs::remove_file(path(name)).unwrap();
        message
    };
    for (name, given) in [("m.gguf", "m.gguf"), ("model.safetensors", ""), ("tokenizer.json", ""), ("config.json", "")]
    {
        for (bytes, remedy) in [
            (POINTER, "a git-lfs pointer in place of the file: run `git lfs pull`"),
            (b"\x1f\x8b\x08\x00\x00", "compressed by gzip: unpack it first"),
            (b"<!DOCTYPE html><html><body>Not found", "a web page in place of the file"),
            (b"", "empty"),
        ] {
            let message = with(name, bytes, given);
            assert!(message.contains(name) && message.contains(remedy), "{message}");
            assert!(!message.contains("[11") && !message.contains("[31"), "{message}");
        }
    }
    let message = with("m.gguf", b"PK\x03\x04\0\0archive/data.pkl", "m.gguf");
    assert!(message.contains("a file of PyTorch: save the model as safetensors"), "{message}");
    let message = with("other.gguf", b"no such thing", "other.gguf");
    assert!(message.contains("it does not begin with \"GGUF\"") && !message.contains("[110"), "{message}");
    let message = with("other.gguf", b"GGUF\0\0\0\x03\0\0\0\0", "other.gguf");
    assert!(message.contains("for big-endian machines"), "{message}");
    let message = with("other.gguf", b"GGUF\x01\0\0\0\0\0\0\0", "other.gguf");
    assert!(message.contains("version 1, expected 2 or 3"), "{message}");
    model.write(folder.path());
    for name in ["model.safetensors", "config.json"] {
        let message = refusal(&path(name), 1);
        assert!(message.contains("a file of a model folder: give the folder"), "{message}");
    }
}

#[test]
fn a_folder_that_is_no_model_is_refused_with_the_remedy() {
    let with = |files: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            std::fs::write(
                folder.path().join(name),
                if *name == "config.json" { llama().to_string() } else { "{}".to_owned() },
            )
            .unwrap();
        }
        refusal(folder.path(), 1)
    };
    for (files, remedy) in [
        (&["README.md"][..], "a folder without config.json is no model"),
        (&["b.gguf", "README.md"], "for its GGUF file, give "),
        (&["adapter_config.json", "adapter_model.safetensors"], "an adapter of PEFT must be merged"),
        (&["params.json", "consolidated.00.pth"], "Meta's own layout must be converted"),
        (&["config.json", "pytorch_model.bin"], "in PyTorch's own format, not in model.safetensors: save"),
        (&["config.json", "pytorch_model.bin.index.json"], "in PyTorch's own format"),
        (&["config.json"], "model.safetensors"),
    ] {
        let message = with(files);
        assert!(message.contains(remedy), "{message}");
    }
}

#[test]
fn layers_that_loops_do_not_divide_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    Model::random(llama(), 1).write(folder.path());
    for num_loops in [0, 3] {
        let message = refusal(folder.path(), num_loops);
        assert!(message.contains(&format!("2 layers, expected a multiple of {num_loops} loops")), "{message}");
    }
}

#[test]
fn tensors_may_lie_in_several_files_and_half_precision() {
    let model = Model::random(llama(), 1);
    let folder = tempfile::tempdir().unwrap();
    let mut files = [Tensors::new(), Tensors::new()];
    let mut weight_map = serde_json::Map::new();
    for (index, (name, tensor)) in model.tensors.iter().enumerate() {
        let dtype = [DType::BF16, DType::F16][index % 2];
        files[index % 2].insert(name.clone(), tensor.to_dtype(dtype).unwrap());
        weight_map.insert(name.clone(), json!(format!("{}.safetensors", index % 2)));
    }
    for (index, tensors) in files.iter().enumerate() {
        candle_core::safetensors::save(tensors, folder.path().join(format!("{index}.safetensors"))).unwrap();
    }
    std::fs::write(folder.path().join("config.json"), model.config.to_string()).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, json!({"weight_map": weight_map}).to_string()).unwrap();
    let weights = Checkpoint::read(folder.path(), 2).unwrap().weights;
    let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let found = flat(weights.get("loops.1.layers.0.mlp.up_proj.weight").unwrap());
    for (found, exact) in found.into_iter().zip(flat(&model.tensors["model.layers.1.mlp.up_proj.weight"])) {
        assert!((found - exact).abs() <= exact.abs() / 128.0, "{found} is not {exact}");
    }

    std::fs::remove_file(folder.path().join("1.safetensors")).unwrap();
    let message = refusal(folder.path(), 2);
    assert!(message.contains("1.safetensors"), "{message}");
    std::fs::write(&index, json!({"weight_map": {"x": "../elsewhere.safetensors"}}).to_string()).unwrap();
    let message = refusal(folder.path(), 2);
    assert!(
        message.contains("`weight_map.x` is \"../elsewhere.safetensors\", expected the name of a file"),
        "{message}"
    );
}

#[test]
fn a_gguf_file_of_another_kind_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, "no such thing").unwrap();
    let message = refusal(&path, 1);
    assert!(message.contains("model.gguf: not a supported GGUF file"), "{message}");
    write_gguf(&Model::random(llama(), 1), &path, &[], &[]);
    let bytes = std::fs::read(&path).unwrap();
    let other = String::from_utf8_lossy(&bytes[..200]).find("llama").unwrap();
    let mut bytes = bytes.clone();
    bytes[other..other + 5].copy_from_slice(b"mamba");
    std::fs::write(&path, bytes).unwrap();
    let message = refusal(&path, 1);
    assert!(message.contains("`general.architecture` is \"mamba\", expected one of llama, gemma3"), "{message}");
}

/// JSON pointers of the numbers in a configuration.
pub fn numbers(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(at.to_owned()),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, item)| numbers(item, &format!("{at}/{index}"), found));
        }
        Value::Object(fields) => fields.iter().for_each(|(key, field)| {
            let key = key.replace('~', "~0").replace('/', "~1");
            numbers(field, &format!("{at}/{key}"), found);
        }),
        _ => {}
    }
}

/// A model folder of this program with everything that its configuration can contain.
fn write_ours(folder: &Path) {
    let config = ModelConfig {
        vocab_size: 19,
        hidden_size: 8,
        intermediate_size: 6,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 4,
        block_layers: 1,
        num_loops: 2,
        prelude_layers: 1,
        coda_layers: 1,
        max_positions: 32,
        lora: Some(LoraConfig { ranks: LoraRanks::all(2), scale: 1.0 }),
        head_lora_rank: 2,
        gate: true,
        ..ModelConfig::default()
    };
    Weights::random(config, 1).unwrap().save(folder, Stored::F32).unwrap();
}

#[test]
fn absurd_numbers_in_configurations_are_refused_or_harmless() {
    let theirs = |config: Value| move |folder: &Path| Model::random(config, 1).write(folder);
    let (llama, gemma3) = (theirs(llama()), theirs(gemma3()));
    type Write = Box<dyn FnOnce(&Path)>;
    let kinds: [(&str, Write); 3] =
        [("ours", Box::new(write_ours)), ("llama", Box::new(llama)), ("gemma3", Box::new(gemma3))];
    for (kind, write) in kinds {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path());
        let path = folder.path().join("config.json");
        let config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let length = std::fs::metadata(folder.path().join("model.safetensors")).unwrap().len() as usize;
        let mut places = Vec::new();
        numbers(&config, "", &mut places);
        assert!(places.len() > 7, "{kind}: {places:?}");
        for place in places {
            for absurd in [json!(0), json!(-1), json!(4096), json!(1 << 24), json!(u64::MAX), json!(1e300), json!(-0.5)]
            {
                let mut config = config.clone();
                *config.pointer_mut(&place).unwrap() = absurd.clone();
                std::fs::write(&path, config.to_string()).unwrap();
                LARGEST.set(0);
                let weights = match kind {
                    "ours" => Weights::load(folder.path()).ok(),
                    _ => Checkpoint::read(folder.path(), 1).ok().map(|checkpoint| checkpoint.weights),
                };
                let positions = weights.as_ref().map_or(0, |weights| weights.config().max_positions);
                let loaded = weights.is_some_and(|weights| EngineModel::load(&weights, WeightType::F32).is_ok());
                // The names of the tensors of 4096 layers, the maximum, take 4 MiB. A rotary table has the sine and
                // cosine of 2 pairs of numbers at each position.
                let (largest, allowed) = (LARGEST.get(), 64 * length + (8 << 20) + 32 * positions);
                assert!(largest <= allowed, "{kind}: {place} {absurd}: {largest} bytes at once, loaded: {loaded}");
            }
        }
    }
}

#[derive(Clone, Debug)]
pub enum Damage {
    Cut(usize),
    Flip(usize, u8),
    Overwrite(usize, u64),
}

pub fn damages() -> impl Strategy<Value = Damage> {
    let place = any::<usize>;
    // Most of a file is numbers, of which any is as good as another; headers come first.
    let early = prop_oneof![place(), 0_usize..3000];
    prop_oneof![
        early.prop_map(Damage::Cut),
        (prop_oneof![place(), 0_usize..3000], 0_u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (prop_oneof![place(), 0_usize..3000], any::<u64>()).prop_map(|(at, value)| Damage::Overwrite(at, value)),
    ]
}

pub fn damage(bytes: &mut Vec<u8>, damage: &Damage) {
    match *damage {
        Damage::Cut(at) => bytes.truncate(at % bytes.len()),
        Damage::Flip(at, bit) => {
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
        }
        Damage::Overwrite(at, value) => {
            let at = at % bytes.len();
            let part = &mut bytes[at..];
            let count = part.len().min(8);
            part[..count].copy_from_slice(&value.to_le_bytes()[..count]);
        }
    }
}

#[test]
fn more_layers_than_tensors_are_refused_before_lists_are_made_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| {
        LARGEST.set(0);
        let message = Checkpoint::read(path, 1).map(|_| ()).unwrap_err().to_string();
        assert!(LARGEST.get() < 1 << 18, "{message}: {} bytes at once", LARGEST.get());
        message
    };
    let mut model = Model::random(llama(), 1);
    model.config["num_hidden_layers"] = json!(2050);
    model.write(folder.path());
    let message = refusal(folder.path());
    assert!(message.contains("`num_hidden_layers` is 2050") && message.contains("no more layers than"), "{message}");

    let gguf = folder.path().join("model.gguf");
    write_gguf(&Model::random(llama(), 1), &gguf, &[], &[]);
    let mut bytes = std::fs::read(&gguf).unwrap();
    let key = b"llama.block_count";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    // Its type, four bytes, and then the number; 2,048 more.
    bytes[at + 4 + 1] ^= 1 << 3;
    std::fs::write(&gguf, &bytes).unwrap();
    let message = refusal(&gguf);
    assert!(message.contains("`llama.block_count` is 2050") && message.contains("no more layers than"), "{message}");
}
