//! Linear layer: three matrix products ([`crate::cpu::gemm`]) whose epilogues do the rest. Formula in [`crate::ops::linear`].

use crate::cpu::Cpu;
use crate::cpu::gemm::{Epilogue, Isa, Layout, columns_by_rows, rows_by_panels};
use crate::device::Act;
use crate::error::Result;
use crate::ops::linear::{Activation, BackwardInput, BackwardWeight, Dims, In, Linear};

impl<A: Act> Linear<A> for Cpu {
    fn linear_forward(&self, dims: Dims, input: In<'_, Self, A>, y: &mut Self::Buf<A>) -> Result<()> {
        let epilogue = Epilogue {
            bias: input.bias.map(|b| &b[..]),
            relu: input.activation == Activation::Relu,
            positive: None,
            accumulate: false,
        };
        let sizes = [dims.rows, dims.outputs, dims.inputs];
        rows_by_panels(Isa::best(), sizes, input.x, input.weight, Layout::Columns, epilogue, y);
        Ok(())
    }

    fn linear_backward_input(
        &self,
        dims: Dims,
        input: BackwardInput<'_, Self, A>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()> {
        let epilogue = Epilogue {
            bias: None,
            relu: false,
            positive: input.relu_output.map(|x| &x[..]),
            accumulate: input.accumulate,
        };
        let sizes = [dims.rows, dims.inputs, dims.outputs];
        rows_by_panels(Isa::best(), sizes, input.dy, input.weight, Layout::Rows, epilogue, dx);
        Ok(())
    }

    fn linear_backward_weight(
        &self,
        dims: Dims,
        input: BackwardWeight<'_, Self, A>,
        dweight: &mut Self::Buf<f32>,
        dbias: Option<&mut Self::Buf<f32>>,
    ) -> Result<()> {
        let sizes = [dims.rows, dims.outputs, dims.inputs];
        columns_by_rows(Isa::best(), sizes, input.dy, input.x, dweight, dbias.map(|b| &mut b[..]));
        Ok(())
    }
}
