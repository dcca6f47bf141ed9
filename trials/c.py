import sys
from proto import *
kind,N=sys.argv[1],int(sys.argv[2]); share=float(sys.argv[3]) if len(sys.argv)>3 else 0.4
trunkfile=f'/tmp/q19/trunk2.pt' if share==0.4 else f'/tmp/q19/trunk2_{share}.pt'
n1=TOTAL*share/p1_cost(2); n2=TOTAL*(1-share)/part_cost(2,2)/N
half=int(n1//64)+64
if not os.path.exists(trunkfile): torch.save(phase1(2,n1,2e-3,perm[:half]),trunkfile)
p=torch.load(trunkfile,weights_only=False); tr=Trunk([p]); base=nats1(tr,p); print(kind,N,share,n1/1e6,n2/1e6,base,flush=True)
xf=trunkfile.replace('.pt','_X.pt')
if not os.path.exists(xf): torch.save(pooled(tr,perm),xf)
X=torch.load(xf)
r=None
if kind=='cluster':
    cb=kmeans(X[:60000],N); a=assign(X,cb); r=router(tr,perm,a,N,tokens=1.2e6)
    idx=[perm[half:][a[half:]==j] for j in range(N)]
    idx=[i if len(i)*64>n2+4096 else np.concatenate([i,perm[:half][a[:half]==j]]) for j,i in enumerate(idx)]
    doms=np.load('/tmp/q19/train.npz')['D'][perm]
    for j in range(N): print(j,(a==j).sum(),np.bincount(doms[a==j],minlength=7))
else:
    rest=perm[half:]; idx=[rest[j::N] for j in range(N)]
parts=[]
for j in range(N):
    q=trunkfile.replace('.pt',f'_{kind}{N}_{j}{os.environ.get("FREEZE_BIAS","")}.pt')
    if not os.path.exists(q): torch.save(part_on(tr,2,n2,2e-3,idx[j],seed=10+j,name=f'{kind}{j}'),q)
    parts.append(torch.load(q,weights_only=False))
log(frozen_bias=os.environ.get('FREEZE_BIAS'),what=f'trunk2 share {share} alone {base:.4f} + {N} {kind} of 2',**{k:(v if not isinstance(v,list) else [float(x) for x in v]) for k,v in ensemble(tr,parts,r).items()})
