//! The layout of the common configuration structure (virtio 1.2, 4.1.4.3).

use crate::frontend::Part;

/// A register of the structure. 64-bit ones are accessed in halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    QueueCount,
    Status,
    Generation,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    /// A part of the queue, and whether it is the high half.
    QueueAddress(Part, bool),
    QueueNotifyData,
    QueueReset,
}

/// Offset, bytes, register.
const FIELDS: [(u64, u8, Field); 21] = [
    (0x00, 4, Field::DeviceFeatureSelect),
    (0x04, 4, Field::DeviceFeature),
    (0x08, 4, Field::DriverFeatureSelect),
    (0x0c, 4, Field::DriverFeature),
    (0x10, 2, Field::ConfigVector),
    (0x12, 2, Field::QueueCount),
    (0x14, 1, Field::Status),
    (0x15, 1, Field::Generation),
    (0x16, 2, Field::QueueSelect),
    (0x18, 2, Field::QueueSize),
    (0x1a, 2, Field::QueueVector),
    (0x1c, 2, Field::QueueEnable),
    (0x1e, 2, Field::QueueNotifyOffset),
    (0x20, 4, Field::QueueAddress(Part::Descriptors, false)),
    (0x24, 4, Field::QueueAddress(Part::Descriptors, true)),
    (0x28, 4, Field::QueueAddress(Part::Driver, false)),
    (0x2c, 4, Field::QueueAddress(Part::Driver, true)),
    (0x30, 4, Field::QueueAddress(Part::Device, false)),
    (0x34, 4, Field::QueueAddress(Part::Device, true)),
    (0x38, 2, Field::QueueNotifyData),
    (0x3a, 2, Field::QueueReset),
];

/// A load of any size at any offset, put together from registers; 0 where there are none.
pub fn read(offset: u64, size: u8, field: impl Fn(Field) -> u32) -> u64 {
    let end = offset + u64::from(size);
    let touched = FIELDS
        .iter()
        .filter(|(at, bytes, _)| *at < end && at + u64::from(*bytes) > offset);
    touched.fold(0, |value, (at, _, name)| {
        let register = u64::from(field(*name));
        value
            | match at.checked_sub(offset) {
                Some(above) => register << (8 * above),
                None => register >> (8 * (offset - at)),
            }
    })
}

/// A store: to all registers that it covers as a whole.
pub fn write(offset: u64, size: u8, value: u64, mut field: impl FnMut(Field, u32)) {
    let end = offset + u64::from(size);
    for (at, bytes, name) in FIELDS {
        if at >= offset && at + u64::from(bytes) <= end {
            let mask = (1 << (8 * bytes)) - 1;
            field(name, (value >> (8 * (at - offset)) & mask) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_lie_next_to_one_another() {
        for pair in FIELDS.windows(2) {
            assert_eq!(pair[0].0 + u64::from(pair[0].1), pair[1].0, "{pair:?}");
        }
    }

    #[test]
    fn a_load_of_any_size_finds_its_bytes() {
        let all = |field| match field {
            Field::Status => 0x0f,
            Field::Generation => 0x22,
            Field::QueueSelect => 0x3344,
            _ => 0,
        };
        assert_eq!(read(0x14, 4, all), 0x3344_220f);
        assert_eq!(read(0x15, 1, all), 0x22);
        assert_eq!(read(0x17, 1, all) & 0xff, 0x33);
        assert_eq!(read(0x3c, 4, all), 0);
    }

    #[test]
    fn a_store_reaches_whole_registers_only() {
        let mut seen = Vec::new();
        write(0x13, 4, 0x4433_2211, |field, value| {
            seen.push((field, value))
        });
        assert_eq!(seen, [(Field::Status, 0x22), (Field::Generation, 0x33)]);
        write(0x20, 4, 0xffff_ffff, |field, value| {
            assert_eq!(field, Field::QueueAddress(Part::Descriptors, false));
            assert_eq!(value, u32::MAX);
        });
    }
}
