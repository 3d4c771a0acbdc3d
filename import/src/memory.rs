//! Memory of a model's activations and logits.

use traces::MemoryFigures;

use crate::model::ModelShape;

/// Memory figures for an unknown device that runs nothing else.
///
/// A row needs its residual, its norm, and the input and output of the widest linear layer, which are live together; and
/// the prelude's output, if every loop reads it. A prediction needs its logits, their copy in 32-bit floats, and the softmax.
pub fn memory_figures(shape: &ModelShape) -> MemoryFigures {
    let widest = shape.linears().into_iter().map(|(inputs, outputs)| inputs + outputs).max().unwrap_or(0);
    MemoryFigures {
        device_bytes: None,
        other_bytes: 0,
        row_bytes: ((2 + u64::from(shape.adapter().is_some())) * shape.hidden + widest) * shape.weight_bytes,
        logits_bytes: shape.devices * shape.vocab * (shape.weight_bytes + 2 * 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{HUGINN, LLAMA, shape};

    #[test]
    fn a_row_takes_the_widest_layer_beside_residual_and_norm() {
        let figures = memory_figures(&shape(LLAMA, 1, 0).unwrap());
        assert_eq!(figures.row_bytes, (2 * 4096 + 4096 + 2 * 14_336) * 2);
        assert_eq!(figures.logits_bytes, 128_256 * 10);
        let huginn = memory_figures(&shape(HUGINN, None, 0).unwrap());
        assert_eq!(huginn.row_bytes, (3 * 5280 + 5280 + 2 * 17_920) * 2);
    }
}
