//! Prefaulting: the system gives a page of memory when it is first written, which costs about as much as zeroing it.

/// Of the smallest page of any machine.
const PAGE: usize = 4096;

/// Writes to every page of `memory`, so that the system gives it; what is in it stays.
///
/// Through a reference that nobody else has, and by plain writes: it needs no call that a system may lack, and cannot race with a kernel.
pub fn touch(memory: &mut [u8]) {
    let rewrite = |byte: &mut u8| *byte = std::hint::black_box(*byte);
    memory.iter_mut().step_by(PAGE).for_each(rewrite);
    // The memory need not begin where a page does.
    memory.last_mut().into_iter().for_each(rewrite);
}

/// Numbers as the bytes they lie in.
pub(super) fn bytes_of<T: Plain>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: any bytes are numbers of these types, which have no padding.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

/// A type of which every pattern of bits is a value.
pub(super) trait Plain {}
impl Plain for f32 {}
impl Plain for i32 {}
impl Plain for i8 {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::packed::pages;

    #[test]
    fn what_is_in_memory_stays() {
        for len in [0, 1, 4095, 4096, 4097, 3 * 4096 + 5] {
            let mut memory: Vec<u8> = (0..len).map(|i| i as u8).collect();
            touch(&mut memory);
            assert!(memory.iter().enumerate().all(|(i, byte)| *byte == i as u8), "{len} bytes");
        }
        let mut numbers = [1.5f32, -2.0];
        touch(bytes_of(&mut numbers));
        assert_eq!(numbers, [1.5, -2.0]);
    }

    /// How many of the map's pages are there.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn present(map: &[u8]) -> usize {
        use std::os::unix::fs::FileExt;
        let mut entries = vec![0; map.len() / PAGE * 8];
        let file = std::fs::File::open("/proc/self/pagemap").unwrap();
        file.read_exact_at(&mut entries, (map.as_ptr() as usize / PAGE * 8) as u64).unwrap();
        // Bit 63 of an entry: the page is there.
        entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count()
    }

    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn pages_are_there_once_touched() {
        const MIB: usize = 1 << 20;
        let mut map = pages(24 * MIB).unwrap();
        assert_eq!(present(&map), 0, "a mapping alone has no pages");
        touch(&mut map[..8 * MIB]);
        // A large page may reach beyond.
        assert!((8 * MIB / PAGE..=10 * MIB / PAGE).contains(&present(&map)), "{} pages", present(&map));
        touch(&mut map);
        assert_eq!(present(&map), 24 * MIB / PAGE);
    }
}
