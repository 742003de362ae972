//! Which kernels compute a model: our own where they have everything that it needs, else candle's operations.

use candle_core::Device;

use crate::config::EngineSettings;
use crate::error::Failure;
use crate::kernels::Need;
#[cfg(any(test, feature = "cuda"))]
use crate::kernels::cuda;
use crate::models::device::check_quantized;
use crate::models::spec::{FeedForward, Mixer, ModelSpec};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda,
    /// Candle's operations, on any device.
    Candle,
    /// Our own for CUDA, as this processor runs them.
    #[cfg(test)]
    Emulated(cuda::Dtype),
}

#[cfg(test)]
pub fn emulated(dtype: cuda::Dtype) -> Result<cuda::Cuda<&'static cuda::emulator::Emulator>, Failure> {
    let emulator = cuda::emulator::Emulator::here().ok_or_else(|| Failure::internal("there is no C++ compiler"))?;
    Ok(cuda::Cuda::new(emulator, dtype))
}

impl Kernels {
    /// What is to compute the model on this device, and what speaks against our own kernels where there are some for it. A GPU is not asked yet
    /// whether they give there what they should.
    pub fn of(device: &Device, spec: &ModelSpec, settings: &EngineSettings) -> (Self, Option<String>) {
        if settings.candle_kernels {
            return (Self::Candle, Some("KERNELS=candle".into()));
        }
        if device.is_cpu() { (Self::Cpu, None) } else { on_gpu(device, spec, settings) }
    }

    /// The same, with what the log is told, and for a GPU once its kernels were tried.
    pub fn for_start(device: &Device, spec: &ModelSpec, settings: &EngineSettings) -> Self {
        let (kernels, why) = Self::of(device, spec, settings);
        if let Some(why) = why {
            tracing::info!("this model is computed by candle's operations, not by our own kernels: {why}");
        }
        #[cfg(feature = "cuda")]
        if kernels == Self::Cuda && !passes(device) {
            return Self::Candle;
        }
        kernels
    }

    /// Refuses weights in a quantized form on a card for which candle's kernels do not have them.
    pub fn check(self, device: &Device, settings: &EngineSettings, quantized_checkpoint: Option<&str>) -> Result<(), Failure> {
        if self != Self::Candle {
            return Ok(());
        }
        if let Some(name) = settings.quantization.name() {
            check_quantized(device, &format!("QUANTIZATION={name}"))?;
        }
        match quantized_checkpoint {
            Some(name) => check_quantized(device, &format!("{name}, a quantized checkpoint (QUANTIZATION=unquantized widens it)")),
            None => Ok(()),
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_device: &Device, _spec: &ModelSpec, _settings: &EngineSettings) -> (Kernels, Option<String>) {
    (Kernels::Candle, None)
}

#[cfg(feature = "cuda")]
fn on_gpu(device: &Device, spec: &ModelSpec, settings: &EngineSettings) -> (Kernels, Option<String>) {
    use crate::config::{KvCacheDtype, TensorParallel};
    use crate::models::device::{capability, device_count};
    let asked = match (settings.kv_cache_dtype, settings.tensor_parallel) {
        (KvCacheDtype::Float32 | KvCacheDtype::Float16 | KvCacheDtype::Int8, _) => Some("KV_CACHE_DTYPE: they hold bfloat16 alone".into()),
        (_, TensorParallel::Ranks(0 | 1)) => None,
        (_, TensorParallel::Auto) if device_count() <= 1 => None,
        _ => Some("TENSOR_PARALLEL_SIZE: they compute alone".into()),
    };
    let lacks = first_missing(spec, cuda::MISSING).map(|need| format!("there is no CUDA kernel yet for {need}"));
    let problem =
        asked.or(lacks).or_else(|| cuda::too_large(&spec.step_limits(1, 1, 1), spec.hidden_size)).or_else(|| match capability(device) {
            Some(card) if card < cuda::LEAST_CAPABILITY => {
                Some(format!("this GPU has compute capability {}.{}, less than 8.0", card.0, card.1))
            }
            _ => None,
        });
    (if problem.is_some() { Kernels::Candle } else { Kernels::Cuda }, problem)
}

/// The kernels on this GPU, with room for the largest step.
#[cfg(feature = "cuda")]
pub fn open_kernels(device: &Device, limits: &crate::kernels::StepLimits) -> Result<cuda::Cuda<cuda::Gpu>, Failure> {
    use crate::models::device::device_failure;
    let Device::Cuda(card) = device else { return Err(Failure::internal(format!("{device:?} is no CUDA device"))) };
    let gpu = cuda::Gpu::new(card).map_err(device_failure)?;
    Ok(cuda::Cuda::new(gpu, cuda::Dtype::Bf16).for_steps(limits))
}

/// Whether every kernel gives on this GPU what the CPU's give. Asked once in a process.
#[cfg(feature = "cuda")]
fn passes(device: &Device) -> bool {
    static PASSED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    let smallest = crate::kernels::StepLimits {
        max_tokens: 0,
        max_logits: 0,
        widest: 0,
        block_size: 1,
        attention: vec![],
        frequencies: 0,
        experts: None,
    };
    *PASSED.get_or_init(|| {
        let since = std::time::Instant::now();
        let found = match open_kernels(device, &smallest) {
            Ok(mut kernels) => kernels.self_check(),
            Err(failure) => vec![cuda::Disagreement { kernels: "none", said: failure.message }],
        };
        for cuda::Disagreement { kernels, said } in &found {
            tracing::warn!("self-check: CUDA kernel {kernels} disagrees: {said}");
        }
        match found.len() {
            0 => tracing::info!("self-check: all CUDA kernels agree with the CPU's, {} ms", since.elapsed().as_millis()),
            count => tracing::warn!("self-check: {count} disagreements; models are computed by candle's operations, which are slower"),
        }
        found.is_empty()
    })
}

/// Something that the model needs and that is `missing`.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn first_missing(spec: &ModelSpec, missing: &[Need]) -> Option<Need> {
    let of_layer = |layer: &crate::models::spec::LayerSpec| {
        let mixer = match &layer.mixer {
            Mixer::Latent(_) => Some(Need::LatentAttention),
            Mixer::ShortConv(_) | Mixer::GatedDelta(_) => Some(Need::States),
            Mixer::Attention(_) => None,
        };
        let sees_all = layer.mixer.attention().filter(|attention| !attention.causal).map(|_| Need::AttentionBothWays);
        let groups = match &layer.feed_forward {
            FeedForward::Experts(experts) => experts.routing.groups.map(|_| Need::ExpertGroups),
            FeedForward::Dense(_) => None,
        };
        [mixer, sees_all, groups]
    };
    spec.layers.iter().flat_map(of_layer).flatten().find(|need| missing.contains(need))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::families::Model;
    use crate::models::golden_families::Golden;

    const ALL: [Need; 4] = [Need::States, Need::LatentAttention, Need::AttentionBothWays, Need::ExpertGroups];

    fn spec(folder: &str, name: &str) -> ModelSpec {
        Model::from_files(&Golden::read_from(folder, name).files()).unwrap().spec
    }

    #[test]
    fn the_setting_and_the_device_decide() {
        let (spec, settings) = (spec("families", "llama"), EngineSettings::default());
        assert_eq!(Kernels::of(&Device::Cpu, &spec, &settings), (Kernels::Cpu, None));
        let forced = EngineSettings { candle_kernels: true, ..settings };
        assert_eq!(Kernels::of(&Device::Cpu, &spec, &forced).0, Kernels::Candle);
    }

    #[test]
    fn what_a_model_needs_beyond_the_usual_is_named() {
        for (folder, name, need) in [
            ("families", "llama", None),
            ("families", "gpt_oss", None),
            ("families", "lfm2", Some(Need::States)),
            ("families", "qwen3_next", Some(Need::States)),
            ("families", "deepseek_v2", Some(Need::LatentAttention)),
            ("pooling", "bert", Some(Need::AttentionBothWays)),
        ] {
            let spec = spec(folder, name);
            assert_eq!(first_missing(&spec, &ALL), need, "{name}");
            assert_eq!(first_missing(&spec, &[]), None, "{name}");
        }
        assert_eq!(first_missing(&spec("families", "deepseek_v3"), &[Need::ExpertGroups]), Some(Need::ExpertGroups));
    }
}
