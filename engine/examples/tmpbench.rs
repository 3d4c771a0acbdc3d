use candle_core::*;
use engine::cache::KvCache;
use engine::executor::in_pool;
use engine::kernels::attention::*;
use engine::kernels::linear::Linear;
use engine::kernels::rows::*;
use engine::kernels::signals::read;
use engine::model::{Model, Rows};
use engine::weights::Weights;
use std::path::Path;
use std::time::Instant;
fn time(n: usize, mut f: impl FnMut()) -> (f64, f64) {
    let mut v = vec![];
    let end = Instant::now() + std::time::Duration::from_millis(250);
    for i in 0..n {
        let t = Instant::now();
        f();
        v.push(t.elapsed().as_secs_f64() * 1e6);
        if i > 20 && Instant::now() > end {
            break;
        }
    }
    v.sort_by(f64::total_cmp);
    (v[0], v[v.len() / 4])
}
fn main() {
    in_pool(|| {
        let w = Weights::load(Path::new("/work/wt/training/models/kjv")).unwrap();
        let model = Model::load(&w).unwrap();
        let dev = Device::Cpu;
        let cache = KvCache::new(model.config(), 64 * 16, 16, &dev).unwrap();
        let blocks: Vec<Vec<u32>> = (0..64).map(|r| (r * 16..r * 16 + 16).collect()).collect();
        let lin = |o: usize, i: usize| Linear::new(&Tensor::randn(0f32, 1., (o, i), &dev).unwrap()).unwrap();
        let (qkv, o, gu, down) = (lin(320, 192), lin(192, 192), lin(1024, 192), lin(192, 512));
        let norm = RmsNorm::new(Tensor::ones(192, DType::F32, &dev).unwrap(), 1e-5);
        let rot = Tensor::from_vec(rotary_table(512, 32, 1e4), (512, 32), &dev).unwrap();
        let params = 2.0 * (2 * (192 * 320 + 192 * 192 + 192 * 1024 + 512 * 192)) as f64;
        println!("threads {}", rayon::current_num_threads());
        for n in [1usize, 2, 4, 8, 16, 32, 64] {
            let nothing = Tensor::zeros((1, 192), DType::F32, &dev).unwrap();
            let src: Vec<Source> = (0..n).map(|r| Source::First(r as u32)).collect();
            let hidden = model.embed(&nothing, &src).unwrap();
            let mut out = vec![];
            for hist in [1usize, 200] {
                let mut rows = Rows::default();
                (0..n).for_each(|r| rows.push(hist, 1, 1..2, &blocks[r]));
                out.push(time(3000, || {
                    let h = hidden.copy().unwrap();
                    model.forward_block(&h, &rows, &cache).unwrap();
                }));
            }
            let keys = vec![0; n];
            let head = time(3000, || {
                read(&model.logits(&hidden).unwrap(), 0.0, &keys).unwrap();
            });
            let lg = model.logits(&hidden).unwrap();
            let sweep = time(3000, || {
                read(&lg, 0.0, &keys).unwrap();
            });
            let x = Tensor::randn(0f32, 1., (n, 192), &dev).unwrap();
            let x5 = Tensor::randn(0f32, 1., (n, 512), &dev).unwrap();
            let g = Tensor::randn(0f32, 1., (n, 1024), &dev).unwrap();
            let q = Tensor::randn(0f32, 1., (n, 320), &dev).unwrap();
            let t = [
                time(3000, || {
                    norm.forward(&x).unwrap();
                })
                .0,
                time(3000, || {
                    qkv.forward(&x).unwrap();
                })
                .0,
                time(3000, || {
                    o.add_to(&x, &x).unwrap_or(());
                })
                .0,
                time(3000, || {
                    gu.forward(&x).unwrap();
                })
                .0,
                time(3000, || {
                    swiglu(&g).unwrap();
                })
                .0,
                time(3000, || {
                    down.add_to(&x, &x5).unwrap();
                })
                .0,
                {
                    let rr: Vec<Row> =
                        (0..n).map(|r| Row { position: 1, depth: 1, fills: 1..2, blocks: &blocks[r] }).collect();
                    time(3000, || {
                        attend(&q, &rot, &cache, 0, Heads { heads: 6, kv_heads: 2, head_dim: 32 }, &rr).unwrap();
                    })
                    .0
                },
                {
                    let rr: Vec<Row> =
                        (0..n).map(|r| Row { position: 200, depth: 1, fills: 1..2, blocks: &blocks[r] }).collect();
                    time(3000, || {
                        attend(&q, &rot, &cache, 0, Heads { heads: 6, kv_heads: 2, head_dim: 32 }, &rr).unwrap();
                    })
                    .0
                },
            ];
            println!(
                "rows {n:3} block {:.0}/{:.0}us ({:.0} GF/s) hist200 {:.0}/{:.0}us head {:.0}us sweep {:.1}us | norm {:.1} qkv {:.1} o {:.1} gu {:.1} swiglu {:.1} down {:.1} attn1 {:.1} attn200 {:.1}",
                out[0].0,
                out[0].1,
                params * n as f64 / out[0].0 * 1e-3,
                out[1].0,
                out[1].1,
                head.0,
                sweep.0,
                t[0],
                t[1],
                t[2],
                t[3],
                t[4],
                t[5],
                t[6],
                t[7]
            );
        }
    })
}
