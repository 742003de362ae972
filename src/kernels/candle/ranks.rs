//! How the sums of ranks on candle's devices meet.

use candle_core::{DType, Error, Result, Tensor};

use crate::ranks::Member;

/// GPUs can sum without the host's memory between them.
pub fn has_nccl() -> bool {
    #[cfg(feature = "cuda")]
    return super::nccl::Nccl::get().is_some();
    #[cfg(not(feature = "cuda"))]
    false
}

/// One rank's way to the others.
pub enum Communicator {
    /// Through the host's memory: any device, and slow on a GPU.
    Host(Member),
    /// From GPU to GPU.
    #[cfg(feature = "cuda")]
    Nccl(super::nccl::Communicator),
}

impl Communicator {
    /// NCCL where it can be loaded and `device` is a GPU, else the host's memory. Every rank must call it; it returns when all of them have.
    ///
    /// # Errors
    /// When another rank has failed, or NCCL does.
    pub fn connect(device: &candle_core::Device, member: Member) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = device
            && let Some(nccl) = super::nccl::Nccl::get()
        {
            return super::nccl::Communicator::connect(nccl, device, member).map(Self::Nccl);
        }
        let _ = device;
        member.meet().map_err(Error::Msg)?;
        Ok(Self::Host(member))
    }

    /// The sum of what all ranks bring, `[rows, width]`.
    pub fn sum(&mut self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Host(member) => {
                let mut values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                member.all_reduce(&mut values).map_err(Error::Msg)?;
                Tensor::from_vec(values, x.shape(), x.device())?.to_dtype(x.dtype())
            }
            #[cfg(feature = "cuda")]
            Self::Nccl(nccl) => x.apply_op1_no_bwd(nccl),
        }
    }
}
