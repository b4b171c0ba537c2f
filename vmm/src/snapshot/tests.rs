use proptest::prelude::*;

use super::probe::sample;
use super::*;

#[test]
fn what_was_written_is_read() {
    let saved = sample();
    let file = encode(&saved).unwrap();
    let read = decode(&file).unwrap();
    assert_eq!(read.config, saved.config);
    assert_eq!(read.devices, saved.devices);
    assert_eq!(read.serial, saved.serial);
    assert_eq!(read.vm.clock.clock, 42);
    assert!(read.vm.pit.is_some());
    for (read, saved) in read.vcpus.iter().zip(&saved.vcpus) {
        assert_eq!(read.regs.rax, saved.regs.rax);
        assert_eq!(read.xsave, saved.xsave);
        assert_eq!(read.cpuid, saved.cpuid);
        assert_eq!(read.msrs, saved.msrs);
    }
    assert_eq!(encode(&read).unwrap(), file, "one state has one encoding");
}

#[test]
fn structures_of_another_size_are_refused() {
    type Spoil = fn(&mut wire::State);
    let spoil: [(&str, Spoil); 9] = [
        ("kvm_regs has 143", |s| s.vcpus[0].regs.truncate(143)),
        ("CPUID", |s| s.vcpus[1].cpuid.push(0)),
        ("0 CPUID", |s| s.vcpus[1].cpuid.clear()),
        ("MSRs", |s| s.vcpus[0].msr_values.push(1)),
        ("XSAVE", |s| s.vcpus[0].xsave_len = u32::MAX),
        ("vCPUs", |s| drop(s.vcpus.pop())),
        ("no VM", |s| s.vm = None),
        ("large", |s| s.devices[0].queues[0].next_used = 1 << 16),
        ("two devices", |s| {
            s.devices[1].balloon = Some(Default::default());
        }),
    ];
    for (text, spoil) in spoil {
        let mut state = convert::to_wire(&sample()).unwrap();
        spoil(&mut state);
        let error = convert::from_wire(state).unwrap_err().to_string();
        assert!(error.contains(text), "{error} does not say {text}");
    }
}

proptest! {
    /// Whatever a body says, it is an error or a state, and nothing else.
    #[test]
    fn changed_bodies_are_states_or_errors(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        use prost::Message;
        let mut body = convert::to_wire(&sample()).unwrap().encode_to_vec();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Ok(state) = wire::State::decode(body.as_slice())
            && let Ok(saved) = convert::from_wire(state)
        {
            prop_assert!(decode(&encode(&saved).unwrap()).is_ok());
        }
    }
}
