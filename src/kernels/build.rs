//! With the feature `cuda`: compiles the CUDA kernels by nvcc into one static library. Each source is an object of its own, with machine code
//! for every architecture and PTX for those to come, compressed; one that has not changed is not compiled again.
//!
//! `NVCC`, `CUDA_HOME` and `CUDA_PATH` say where nvcc is, else `PATH`; `KERNEL_ARCHITECTURES=90` or `80,90` limits the architectures, for quick builds.

// Cargo reads what is printed.
#![allow(clippy::print_stdout)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SOURCES: [&str; 13] =
    ["error", "rows", "embed", "gemv", "matmul", "rope", "attend", "attend_tiles", "experts", "conv", "delta", "latent", "sample"];
/// Compute capabilities: A100, A10 and 3090, L4 and 4090, H100 and H200, B200, 5090.
const ARCHITECTURES: &str = "80,86,89,90,100,120";
const FLAGS: [&str; 8] = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler", "-fPIC", "-Xfatbin", "-compress-all", "-c"];

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "KERNEL_ARCHITECTURES"]
        .iter()
        .for_each(|name| println!("cargo:rerun-if-env-changed={name}"));
    let (folder, out) = (PathBuf::from("cuda"), PathBuf::from(std::env::var("OUT_DIR")?));
    let (nvcc, flags) = (nvcc(), flags()?);
    let mut headers = DefaultHasher::new();
    (&nvcc, &flags, FLAGS).hash(&mut headers);
    let mut names: Vec<PathBuf> = std::fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    names.retain(|path| path.extension().is_some_and(|extension| extension == "h"));
    names.sort();
    names.iter().for_each(|path| println!("cargo:rerun-if-changed={}", path.display()));
    names.iter().try_for_each(|path| std::fs::read(path).map(|text| text.hash(&mut headers)))?;
    let objects = SOURCES.iter().map(|name| {
        let source = folder.join(format!("{name}.cu"));
        println!("cargo:rerun-if-changed={}", source.display());
        let mut hasher = headers.clone();
        std::fs::read(&source)?.hash(&mut hasher);
        Ok((source, out.join(format!("{name}-{:016x}.o", hasher.finish()))))
    });
    let objects: Vec<(PathBuf, PathBuf)> = objects.collect::<Result<_>>()?;
    compile(&nvcc, &flags, &objects)?;
    archive(&out.join("libworker_candle_cuda.a"), &objects)?;
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static=worker_candle_cuda");
    // As candle-kernels links it, so that there is one copy of CUDA's runtime in the process.
    println!("cargo:rustc-link-lib=dylib=cudart");
    println!("cargo:rustc-link-lib=dylib=stdc++");
    Ok(())
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os);
    homes.map(|home| Path::new(&home).join("bin/nvcc")).find(|path| path.exists()).unwrap_or_else(|| "nvcc".into())
}

/// Machine code for each architecture, and PTX of the highest below 10: later ones compile that.
fn flags() -> Result<Vec<String>> {
    let asked = std::env::var("KERNEL_ARCHITECTURES").ok().filter(|text| !text.trim().is_empty());
    let text = asked.unwrap_or_else(|| ARCHITECTURES.into());
    let parse =
        |part: &str| part.trim().parse::<u32>().map_err(|_| format!("KERNEL_ARCHITECTURES={text}: \"{part}\" is not a number such as 90"));
    let numbers = text.split(',').map(parse).collect::<std::result::Result<Vec<_>, _>>()?;
    if let Some(old) = numbers.iter().find(|number| **number < 80) {
        return Err(format!("KERNEL_ARCHITECTURES={text}: the kernels need 80 or newer, not {old}").into());
    }
    let portable = numbers.iter().copied().filter(|number| *number < 100).max().or(numbers.iter().copied().min());
    let of = |number: &u32| match Some(*number) == portable {
        true => format!("arch=compute_{number},code=[sm_{number},compute_{number}]"),
        false => format!("arch=compute_{number},code=sm_{number}"),
    };
    Ok(numbers.iter().flat_map(|number| ["-gencode".to_owned(), of(number)]).collect())
}

/// Those that are not there yet, as many at a time as cargo allows.
fn compile(nvcc: &Path, flags: &[String], objects: &[(PathBuf, PathBuf)]) -> Result<()> {
    let todo = Mutex::new(objects.iter().filter(|(_, object)| !object.exists()).collect::<Vec<_>>());
    let next = || todo.lock().ok().and_then(|mut todo| todo.pop());
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let failures = std::thread::scope(|scope| {
        let work = || {
            let mut said = Vec::new();
            while let Some((source, object)) = next() {
                // Under another name first: a build that is stopped leaves nothing that looks whole.
                let part = object.with_extension("part");
                let output = Command::new(nvcc).args(FLAGS).args(flags).arg(source).arg("-o").arg(&part).output();
                match output {
                    Ok(output) if output.status.success() => {
                        std::fs::rename(&part, object).unwrap_or_else(|error| said.push(format!("{}: {error}", object.display())));
                    }
                    Ok(output) => said.push(format!("{}: {}", source.display(), String::from_utf8_lossy(&output.stderr))),
                    Err(error) => said.push(format!("{}: {error}; the feature cuda needs CUDA's compiler", nvcc.display())),
                }
            }
            said
        };
        let threads: Vec<_> = (0..jobs.clamp(1, objects.len())).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|_| vec!["a build ended early".into()])).collect::<Vec<String>>()
    });
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n").into()) }
}

fn archive(library: &Path, objects: &[(PathBuf, PathBuf)]) -> Result<()> {
    if library.exists() {
        std::fs::remove_file(library)?;
    }
    let status = Command::new("ar").arg("crs").arg(library).args(objects.iter().map(|(_, object)| object)).status()?;
    if status.success() { Ok(()) } else { Err(format!("ar could not make {}", library.display()).into()) }
}
