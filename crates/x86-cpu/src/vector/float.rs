//! Which instructions read or write MXCSR.

use iced_x86::Mnemonic;

/// Whether results or flags of `m` depend on MXCSR, or `m` can raise #XM.
/// (Mnemonics shared with string instructions are told apart by operands.)
pub(super) fn uses_mxcsr(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Addpd
            | Addps
            | Addsd
            | Addss
            | Addsubpd
            | Addsubps
            | Cmppd
            | Cmpps
            | Cmpsd
            | Cmpss
            | Comisd
            | Comiss
            | Cvtdq2pd
            | Cvtdq2ps
            | Cvtpd2dq
            | Cvtpd2pi
            | Cvtpd2ps
            | Cvtpi2pd
            | Cvtpi2ps
            | Cvtps2dq
            | Cvtps2pd
            | Cvtps2pi
            | Cvtsd2si
            | Cvtsd2ss
            | Cvtsi2sd
            | Cvtsi2ss
            | Cvtss2sd
            | Cvtss2si
            | Cvttpd2dq
            | Cvttpd2pi
            | Cvttps2dq
            | Cvttps2pi
            | Cvttsd2si
            | Cvttss2si
            | Divpd
            | Divps
            | Divsd
            | Divss
            | Dppd
            | Dpps
            | Haddpd
            | Haddps
            | Hsubpd
            | Hsubps
            | Maxpd
            | Maxps
            | Maxsd
            | Maxss
            | Minpd
            | Minps
            | Minsd
            | Minss
            | Mulpd
            | Mulps
            | Mulsd
            | Mulss
            | Rcpps
            | Rcpss
            | Roundpd
            | Roundps
            | Roundsd
            | Roundss
            | Rsqrtps
            | Rsqrtss
            | Sqrtpd
            | Sqrtps
            | Sqrtsd
            | Sqrtss
            | Subpd
            | Subps
            | Subsd
            | Subss
            | Ucomisd
            | Ucomiss
            | Vaddpd
            | Vaddps
            | Vaddsd
            | Vaddss
            | Vaddsubpd
            | Vaddsubps
            | Vcmppd
            | Vcmpps
            | Vcmpsd
            | Vcmpss
            | Vcomisd
            | Vcomiss
            | Vcvtdq2pd
            | Vcvtdq2ps
            | Vcvtpd2dq
            | Vcvtpd2ps
            | Vcvtph2ps
            | Vcvtps2dq
            | Vcvtps2pd
            | Vcvtps2ph
            | Vcvtsd2si
            | Vcvtsd2ss
            | Vcvtsi2sd
            | Vcvtsi2ss
            | Vcvtss2sd
            | Vcvtss2si
            | Vcvttpd2dq
            | Vcvttps2dq
            | Vcvttsd2si
            | Vcvttss2si
            | Vdivpd
            | Vdivps
            | Vdivsd
            | Vdivss
            | Vdppd
            | Vdpps
            | Vfmadd132pd
            | Vfmadd132ps
            | Vfmadd132sd
            | Vfmadd132ss
            | Vfmadd213pd
            | Vfmadd213ps
            | Vfmadd213sd
            | Vfmadd213ss
            | Vfmadd231pd
            | Vfmadd231ps
            | Vfmadd231sd
            | Vfmadd231ss
            | Vfmaddsub132pd
            | Vfmaddsub132ps
            | Vfmaddsub213pd
            | Vfmaddsub213ps
            | Vfmaddsub231pd
            | Vfmaddsub231ps
            | Vfmsub132pd
            | Vfmsub132ps
            | Vfmsub132sd
            | Vfmsub132ss
            | Vfmsub213pd
            | Vfmsub213ps
            | Vfmsub213sd
            | Vfmsub213ss
            | Vfmsub231pd
            | Vfmsub231ps
            | Vfmsub231sd
            | Vfmsub231ss
            | Vfmsubadd132pd
            | Vfmsubadd132ps
            | Vfmsubadd213pd
            | Vfmsubadd213ps
            | Vfmsubadd231pd
            | Vfmsubadd231ps
            | Vfnmadd132pd
            | Vfnmadd132ps
            | Vfnmadd132sd
            | Vfnmadd132ss
            | Vfnmadd213pd
            | Vfnmadd213ps
            | Vfnmadd213sd
            | Vfnmadd213ss
            | Vfnmadd231pd
            | Vfnmadd231ps
            | Vfnmadd231sd
            | Vfnmadd231ss
            | Vfnmsub132pd
            | Vfnmsub132ps
            | Vfnmsub132sd
            | Vfnmsub132ss
            | Vfnmsub213pd
            | Vfnmsub213ps
            | Vfnmsub213sd
            | Vfnmsub213ss
            | Vfnmsub231pd
            | Vfnmsub231ps
            | Vfnmsub231sd
            | Vfnmsub231ss
            | Vhaddpd
            | Vhaddps
            | Vhsubpd
            | Vhsubps
            | Vmaxpd
            | Vmaxps
            | Vmaxsd
            | Vmaxss
            | Vminpd
            | Vminps
            | Vminsd
            | Vminss
            | Vmulpd
            | Vmulps
            | Vmulsd
            | Vmulss
            | Vrcpps
            | Vrcpss
            | Vroundpd
            | Vroundps
            | Vroundsd
            | Vroundss
            | Vrsqrtps
            | Vrsqrtss
            | Vsqrtpd
            | Vsqrtps
            | Vsqrtsd
            | Vsqrtss
            | Vsubpd
            | Vsubps
            | Vsubsd
            | Vsubss
            | Vucomisd
            | Vucomiss
    )
}

/// Whether `m` can produce a tiny result, and so raise an underflow exception
/// without losing precision when that exception is unmasked. Gives the size of
/// the result's elements and whether only the lowest one is computed.
pub(super) fn can_underflow(m: Mnemonic) -> Option<(usize, bool)> {
    use Mnemonic::*;
    if !uses_mxcsr(m) {
        return None;
    }
    let name = alloc::format!("{m:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    if matches!(m, Cvtpd2ps | Vcvtpd2ps) {
        return Some((4, false));
    }
    if matches!(m, Cvtsd2ss | Vcvtsd2ss) {
        return Some((4, true));
    }
    if matches!(m, Vcvtps2ph) {
        return Some((2, false));
    }
    let arithmetic = [
        "add", "sub", "mul", "div", "hadd", "hsub", "dp", "fm", "fnm",
    ];
    if !arithmetic.iter().any(|a| name.starts_with(a)) {
        return None;
    }
    Some((
        if name.ends_with('d') { 8 } else { 4 },
        name.as_bytes()[name.len() - 2] == b's',
    ))
}
